"""`headrace dead-letters`: tickets that could not be generated, scored or decoded; lists, retries or purges them.

    python -m headrace.learner.commands.dead_letters list|retry|purge --run demo [TICKET ...]

`list` with tickets shows what was kept of each, up to a limit: its prompt, its reference and completions. `retry` asks
the learner to issue the ticket again from the data, with fresh attempts; if no learner runs, the next one does it.
`purge` deletes what was kept; the ledger still says that the ticket is dead.
"""

import argparse
import contextlib
import json
import os
import sys
import textwrap
import time
from typing import Any, NamedTuple

import msgspec
import redis

from headrace.common.process.redaction import printable
from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.common.wire import WireError, decode_group, decode_ticket
from headrace.common.wire.ledger import LedgerEntry, parse_ledger_entry, parse_ticket_id

_PURGE = """#!lua
redis.call('XDEL', KEYS[1], ARGV[1])
if redis.call('HGET', KEYS[2], ARGV[2]) == 'dead ' .. ARGV[1] then redis.call('HSET', KEYS[2], ARGV[2], 'dead') end
return redis.call('SREM', KEYS[3], ARGV[2])
"""


class DeadLetter(NamedTuple):
    entry_id: str
    ticket_id: str
    reason: str
    is_ticket: bool
    """False if the entry is not a ticket of this run."""


def dead_letters(client: redis.Redis, keys: Keys) -> list[DeadLetter]:
    """The oldest first."""
    rows: Any = client.xrange(keys.dead_letters)
    names = [fields.get(b"id", b"?").decode(errors="replace") for _, fields in rows]
    ledger: Any = client.hmget(keys.ledger, names) if names else []
    return [
        DeadLetter(
            entry_id.decode(),
            name,
            fields.get(b"reason", b"").decode(errors="replace"),
            known is not None and parse_ledger_entry(known) == LedgerEntry("dead", entry_id.decode()),
        )
        for (entry_id, fields), name, known in zip(rows, names, ledger, strict=True)
    ]


class KeptPayload(NamedTuple):
    """What was kept of a dead ticket; empty if it could not be decoded."""

    messages: list[dict[str, Any]] = []
    reference: dict[str, Any] = {}
    attempts: int = 0
    completions: list[str] = []
    """Those that could not be scored, or all of a group that could not be used: the first few, cut to a length."""


def kept_payload(client: redis.Redis, keys: Keys, entry_id: str) -> KeptPayload:
    entries: Any = client.xrange(keys.dead_letters, entry_id, entry_id)
    fields = entries[0][1] if entries else {}
    payload, completions = fields.get(b"payload", b""), []
    with contextlib.suppress(ValueError):
        completions = msgspec.json.decode(fields.get(b"completions", b""), type=list[str])
    try:
        ticket = decode_ticket(payload)
    except WireError:
        try:
            group = decode_group(payload)
        except WireError:
            return KeptPayload(completions=completions)
        ticket, completions = group.ticket, [rollout.text for rollout in group.rollouts]
    return KeptPayload(ticket.messages, ticket.reference, ticket.attempts, completions)


def retry(client: redis.Redis, keys: Keys, ticket_ids: list[str]) -> list[str]:
    """Returns the tickets that will be issued again: those named, or all. Raises `ValueError` for one that cannot."""
    known = {dead.ticket_id for dead in dead_letters(client, keys) if dead.is_ticket}
    for name in ticket_ids:
        if name not in known:
            raise ValueError(f"ticket {name!r} is not dead: expected one of `headrace dead-letters list`")
        if parse_ticket_id(name).kind == "eval":
            raise ValueError(f"ticket {name!r} belongs to an evaluation, which is over")
    chosen = ticket_ids or sorted(name for name in known if parse_ticket_id(name).kind == "train")
    if chosen:
        client.sadd(keys.retries, *chosen)
    return chosen


def purge(client: redis.Redis, keys: Keys, ticket_ids: list[str]) -> list[str]:
    """Returns the ids of what was purged: those named, or everything."""
    chosen = _chosen(dead_letters(client, keys), ticket_ids)
    for dead in chosen:
        client.eval(_PURGE, 3, keys.dead_letters, keys.ledger, keys.retries, dead.entry_id, dead.ticket_id)
    return [dead.ticket_id for dead in chosen]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m headrace.learner.commands.dead_letters")
    parser.add_argument("action", choices=("list", "retry", "purge"))
    parser.add_argument("tickets", nargs="*")
    parser.add_argument("--run", required=True)
    parser.add_argument("--runs-folder", help="ignored: dead letters are in Redis")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--redis-url", default=os.environ.get("HEADRACE_REDIS_URL"))
    arguments = parser.parse_intermixed_args()
    if not arguments.redis_url:
        parser.error("expected --redis-url or HEADRACE_REDIS_URL")
    try:
        client, keys = connect(arguments.redis_url), Keys(arguments.run)
        if arguments.action == "list":
            _list(client, keys, arguments.tickets, arguments.json)
            return 0
        act, what = (
            (retry, "tickets will be issued again by the learner") if arguments.action == "retry" else (purge, "purged")
        )
        chosen = act(client, keys, arguments.tickets)
        print(json.dumps({"tickets": chosen}) if arguments.json else f"{len(chosen)} {what}")
    except (ValueError, redis.RedisError) as error:
        print(f"headrace dead-letters: {error}", file=sys.stderr)
        return 2
    return 0


def _list(client: redis.Redis, keys: Keys, ticket_ids: list[str], as_json: bool) -> None:
    entries = _chosen(dead_letters(client, keys), ticket_ids)
    kept = {dead.entry_id: kept_payload(client, keys, dead.entry_id) for dead in entries if ticket_ids}
    if as_json:
        rows = [{**dead._asdict(), "at": int(dead.entry_id.partition("-")[0]) / 1000} for dead in entries]
        rows = [row | (kept[row["entry_id"]]._asdict() if ticket_ids else {}) for row in rows]
        print(json.dumps({"dead": rows}, indent=2))
        return
    for dead in entries:
        died = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(dead.entry_id.partition("-")[0]) / 1000))
        name = dead.ticket_id if dead.is_ticket else f"({dead.ticket_id}, no ticket of this run)"
        print(printable(f"{died}  {name}  {dead.reason}"))
        if ticket_ids:
            print(printable(_format(kept[dead.entry_id])))
    if not ticket_ids:
        print(f"{len(entries)} dead" + ("; `list TICKET ...` shows prompts and completions" * bool(entries)))


def _format(kept: KeptPayload) -> str:
    parts = [(message["role"], message["content"]) for message in kept.messages]
    parts.append(("reference", json.dumps(kept.reference, ensure_ascii=False)))
    parts += [(f"completion {index}", text) for index, text in enumerate(kept.completions, 1)]
    return "\n".join(f"  {name}:\n{textwrap.indent(text or '(empty)', '    ')}" for name, text in parts)


def _chosen(entries: list[DeadLetter], ticket_ids: list[str]) -> list[DeadLetter]:
    """Those named, or all. Raises `ValueError` naming one that is not dead."""
    missing = set(ticket_ids) - {dead.ticket_id for dead in entries}
    if missing:
        raise ValueError(f"ticket {sorted(missing)[0]!r} is not dead: expected one of `headrace dead-letters list`")
    return [dead for dead in entries if not ticket_ids or dead.ticket_id in ticket_ids]


if __name__ == "__main__":
    sys.exit(main())
