"""Lua scripts: move tickets out of their stream, renew leases. Each is one atomic step of Redis."""

MOVE = """#!lua
local moved = {}
local at = 3
while at < #ARGV do
  local entry, id, last = ARGV[at], ARGV[at + 1], at + 2 + ARGV[at + 2]
  local is_ours = false
  if #redis.call('XPENDING', KEYS[1], ARGV[1], entry, entry, 1) > 0 then
    is_ours = redis.call('HGET', KEYS[4], id) == 'open ' .. entry
    if is_ours then
      local added = redis.call('XADD', KEYS[2], '*', 'id', id, unpack(ARGV, at + 3, last))
      redis.call('HSET', KEYS[4], id, ARGV[2] .. ' ' .. added)
    else
      redis.call('XADD', KEYS[3], '*', 'id', id, 'reason', 'the ledger knows no such open ticket')
    end
    redis.call('XACK', KEYS[1], ARGV[1], entry)
    redis.call('XDEL', KEYS[1], entry)
  end
  moved[#moved + 1] = is_ours and 1 or 0
  at = last + 1
end
return moved
"""
"""KEYS: source stream, target stream, dead letters, ledger. ARGV: consumer group, new ticket state; then for each
ticket its entry id, its ticket id, the number of field names and values that follow, and those. Returns 1 for each
ticket that was moved, else 0."""

RENEW = """
local renewed = 0
for i = 3, #ARGV do
  if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2]) == 1 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
    renewed = renewed + 1
  end
end
return renewed
"""
