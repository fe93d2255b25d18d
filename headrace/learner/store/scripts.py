"""The learner's Lua scripts, each one atomic step of Redis. All but `TAKE_EPOCH` check the fence first.

KEYS[1] is the epoch's key, the last key that of the number of the learner's latest write. ARGV[1] has the learner's
epoch, the number of its latest write that Redis has acknowledged, and the number of this write. If Redis has a higher
epoch, the error is FENCED; if it has a lower one or none, or lacks an acknowledged write, LOST. Scripts that free
memory or are small run even when Redis is full (`allow-oom`). Adding tickets does not: that is backpressure.
"""

_CHECK = """
local own, acknowledged, number = string.match(ARGV[1], '^(%d+) (%d+) (%d+)$')
local epoch = tonumber(redis.call('GET', KEYS[1]) or '-1')
local latest = tonumber(redis.call('GET', KEYS[#KEYS]) or '0')
if epoch > tonumber(own) then return redis.error_reply('FENCED by epoch ' .. epoch) end
if epoch < tonumber(own) then return redis.error_reply('LOST the epoch is ' .. epoch) end
if latest < tonumber(acknowledged) then
  return redis.error_reply('LOST its latest write is ' .. latest .. ' of ' .. acknowledged)
end
"""
_FENCED = _CHECK + "redis.call('SET', KEYS[#KEYS], math.max(latest, tonumber(number)))\n"
_ALWAYS = "#!lua flags=allow-oom\n" + _FENCED
_UNLESS_FULL = "#!lua\n" + _FENCED

TAKE_EPOCH = """#!lua flags=allow-oom
local taken = redis.call('HGET', KEYS[2], ARGV[1])
if taken then return tonumber(taken) end
local epoch = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[2])) + 1
redis.call('SET', KEYS[1], epoch)
redis.call('HSET', KEYS[2], ARGV[1], epoch)
redis.call('DEL', KEYS[3])
return epoch
"""
"""KEYS: epoch, epochs, write_number. ARGV: the name of a learner's start, an epoch to exceed. It sets the fence, so it
checks none. A duplicate that arrives late, even after the next learner's, changes nothing."""

EXECUTE = (
    _ALWAYS
    + """
local at = 2
while at < #ARGV do
  redis.call(unpack(ARGV, at + 1, at + ARGV[at]))
  at = at + 1 + ARGV[at]
end
return 'OK'
"""
)
"""ARGV: each command as its number of parts, then the parts."""

QUEUE_STATE = (
    "#!lua flags=no-writes\n"
    + _CHECK
    + """
local marks = {}
if #ARGV > 1 then marks = redis.call('HMGET', KEYS[4], unpack(ARGV, 2)) end
return {redis.call('XLEN', KEYS[2]), redis.call('XLEN', KEYS[3]), marks}
"""
)
"""KEYS: epoch, tickets, groups, ledger. ARGV: fence, ticket ids. Returns both lengths and the ledger entries, of one
instant."""

ADD_TICKETS = (
    _UNLESS_FULL
    + """
for i = 4, #ARGV, 4 do
  local id, mark = ARGV[i], ARGV[i + 1]
  if redis.call('HEXISTS', KEYS[3], id) == 0 then
    if mark ~= 'skipped' then
      local stream = mark == 'dead' and KEYS[5] or KEYS[2]
      mark = mark .. ' ' .. redis.call('XADD', stream, '*', 'id', id, ARGV[i + 2], ARGV[i + 3])
    end
    redis.call('HSET', KEYS[3], id, mark)
  end
end
if ARGV[2] ~= '' then redis.call('HSET', KEYS[4], 'epoch', ARGV[2], 'place', ARGV[3]) end
return 'OK'
"""
)
"""KEYS: epoch, stream, ledger, cursor, dead. ARGV: fence, the cursor's two numbers (or empty), then of each ticket its
id, its state, and the name and value of a field: the ticket, the group, or the reason why it is dead; both empty if it
is skipped. Tickets that the ledger has are ignored."""

SETTLE = (
    _ALWAYS
    + """
for i = 3, #ARGV, 4 do
  local stream, entry, id, state = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local mark = redis.call('HGET', KEYS[2], id) or ''
  local open, other = string.match(mark, '^open (.+)$'), string.match(mark, '^answered (.+)$')
  if other == entry then other = nil end
  if other then redis.call('XDEL', stream, other) end
  if open then
    for _, tickets in ipairs({KEYS[3], KEYS[4]}) do
      redis.call('XACK', tickets, 'generation', open)
      redis.call('XDEL', tickets, open)
    end
  end
  if ARGV[2] == 'delete' then redis.call('XDEL', stream, entry) end
  if ARGV[2] == 'delete' or open or other or mark == '' then redis.call('HSET', KEYS[2], id, state) end
end
return 'OK'
"""
)
"""KEYS: epoch, ledger, tickets, eval_tickets. ARGV: fence, `delete` or `keep`, then stream, entry, ticket and state of
each. `delete` writes the states and deletes the groups. `keep` only repairs a Redis that is older than the checkpoint:
a ticket that it shows as open, or not at all, was answered and consumed before; one that it shows as answered with
another group was answered a second time since, for nothing."""

DEAD_LETTER = (
    _ALWAYS
    + """
if #redis.call('XRANGE', KEYS[2], ARGV[2], ARGV[2]) == 0 then return 0 end
local added = redis.call('XADD', KEYS[3], '*', 'id', ARGV[3], 'reason', ARGV[4], 'payload', ARGV[5], 'bytes', ARGV[6])
if redis.call('HGET', KEYS[4], ARGV[3]) == 'answered ' .. ARGV[2] then
  redis.call('HSET', KEYS[4], ARGV[3], 'dead ' .. added)
end
redis.call('XDEL', KEYS[2], ARGV[2])
return 1
"""
)
"""KEYS: epoch, stream, dead, ledger. ARGV: fence, entry, ticket, reason, payload, its bytes before it was cut."""

REQUEUE_DEAD = (
    _UNLESS_FULL
    + """
local dead = string.match(redis.call('HGET', KEYS[2], ARGV[2]) or '', '^dead (.+)$')
if dead then
  local added = redis.call('XADD', KEYS[3], '*', 'id', ARGV[2], 'ticket', ARGV[3])
  redis.call('HSET', KEYS[2], ARGV[2], 'open ' .. added)
  redis.call('XDEL', KEYS[4], dead)
end
redis.call('SREM', KEYS[5], ARGV[2])
return dead and 1 or 0
"""
)
"""KEYS: epoch, ledger, tickets, dead, retries. ARGV: fence, ticket, its payload."""

FENCED_SCRIPTS = (EXECUTE, QUEUE_STATE, ADD_TICKETS, SETTLE, DEAD_LETTER, REQUEUE_DEAD)
