"""`headrace record`: follows a run and writes every training group that replicas commit to a recording.

    python -m headrace.learner.commands.record --run demo --output runs/demo/recording.msgpack

It only reads. Groups stay in Redis until the second checkpoint after them, so a recorder that runs beside the learner
misses none, and a stopped one continues where it was. It ends with the run, or at Ctrl-C.
"""

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import redis

from headrace.common.process.logs import set_up_logging
from headrace.common.redis.client import connect, stream_entries
from headrace.common.redis.keys import Keys
from headrace.learner.intake.recordings import Header, RecordedGroup, RecordingWriter

ENDED = (b"finished", b"stopped", b"failed", b"starved")
READ_COUNT = 64
BLOCK_MS = 500


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m headrace.learner.commands.record")
    parser.add_argument("--run", required=True)
    parser.add_argument("--runs-folder", type=Path, default=Path("runs"))
    parser.add_argument("--redis-url", default=os.environ.get("HEADRACE_REDIS_URL"))
    parser.add_argument("--output", type=Path, default=None, help="default: recording.msgpack in the run's folder")
    parser.add_argument("--ended", action="store_true", help="the run is over: write what is in Redis, and exit")
    arguments = parser.parse_args()
    set_up_logging("record", run=arguments.run)
    if not arguments.redis_url:
        parser.error("expected --redis-url or HEADRACE_REDIS_URL")
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    output = arguments.output or arguments.runs_folder / arguments.run / "recording.msgpack"
    try:
        client = connect(arguments.redis_url, is_stopping=stopping.is_set)
        num_groups = follow(client, Keys(arguments.run), arguments.run, output, stopping, arguments.ended)
    except (ValueError, redis.RedisError) as error:
        print(f"headrace record: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(f"{num_groups} groups of run {arguments.run} in {output}")
    return 0


def follow(
    client: redis.Redis, keys: Keys, run: str, output: Path, stopping: threading.Event, has_ended: bool = False
) -> int:
    """Returns how many groups the recording has. Raises `ValueError` if there is no such run."""
    config: Any = client.get(keys.config)
    if config is None:
        raise ValueError(f"run {run!r} is not in this Redis: expected its configuration under {keys.config}")
    writer = RecordingWriter(output, Header(run, msgspec.json.decode(config)))
    try:
        _warn_of_missed_groups(client, keys, writer)
        while True:
            has_ended = has_ended or client.hget(keys.learner, "phase") in ENDED
            found: Any = client.xread({keys.groups: writer.last_entry_id}, count=READ_COUNT, block=BLOCK_MS)
            entries = list(stream_entries(found))
            if entries:  # their versions were published before they were sampled
                steps: Any = client.hgetall(keys.versions)
                writer.add_versions({int(version): int(step) for version, step in steps.items()})
            for _, entry_id, fields in entries:
                ticket_id = fields.get(b"id", b"?").decode(errors="replace")
                writer.add(RecordedGroup(entry_id.decode(), ticket_id, fields.get(b"group", b"")))
            writer.flush()
            if stopping.is_set() or (has_ended and not entries):
                return writer.num_groups
    finally:
        writer.close()


def _warn_of_missed_groups(client: redis.Redis, keys: Keys, writer: RecordingWriter) -> None:
    try:
        deleted: bytes = client.xinfo_stream(keys.groups)["max-deleted-entry-id"]
    except redis.ResponseError:  # no stream yet
        return
    if _id_numbers(deleted) > _id_numbers(writer.last_entry_id.encode()):
        print(f"groups up to {deleted.decode()} have left Redis before they were recorded", file=sys.stderr)


def _id_numbers(entry_id: bytes) -> tuple[int, int]:
    first, _, second = entry_id.partition(b"-")
    return int(first), int(second or 0)


if __name__ == "__main__":
    sys.exit(main())
