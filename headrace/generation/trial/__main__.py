"""Plays what `headrace try` asks for.

    python -m headrace.generation.trial < a TrialRequest in msgpack

Writes a line of JSON for each `TrialEvent`; what foreign code prints goes to standard error. SIGTERM ends it, with all
that it started.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable

import msgspec

from headrace.common.wire.trial_report import Failed, TrialEvent, TrialRequest
from headrace.generation.engine.client import EngineError
from headrace.generation.trial.play import play
from headrace.generation.workers.process import WorkerError


def main() -> int:
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(event: TrialEvent) -> None:
        events.write(msgspec.json.encode(event) + b"\n")
        events.flush()

    request = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=TrialRequest)
    try:
        asyncio.run(_play_until_terminated(request, send))
    except (EngineError, WorkerError) as error:
        send(Failed(str(error)))
    except ValueError as error:
        send(Failed(str(error), is_refusal=True))
    except asyncio.CancelledError:
        pass
    return 0


async def _play_until_terminated(request: TrialRequest, send: Callable[[TrialEvent], None]) -> None:
    playing = asyncio.current_task()
    assert playing is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, playing.cancel)
    await play(request, send)


if __name__ == "__main__":
    sys.exit(main())
