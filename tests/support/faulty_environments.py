"""Tasks with `rollout` for the tests of environment workers, chosen by import path. A ticket's reference says what its
episode does."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.common.environments import BlockingChat, Chat, ChatError
from headrace.common.tasks import Outcome, Prompt, Split
from headrace.common.wire import Ticket
from tests.support.faulty_tasks import chatter, eat_memory, spy

RETURNED = {"nan": math.nan, "none": None, "text": "1.0", "metric": Outcome(1.0, {"turns": math.inf})}


class Environment:
    """Its rollout does what `reference["do"]` says, a word and an argument; a number is its reward."""

    def __init__(self) -> None:
        self._num_met = 0
        self._all_met = asyncio.Event()

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        return iter([Prompt([{"role": "user", "content": f"{split}?"}], {"do": "reply"})])

    async def rollout(self, chat: Chat, ticket: Ticket) -> Any:
        order, _, argument = ticket.reference["do"].partition(" ")
        match order:
            case "reply":
                return Outcome(float((await chat.reply()).text), {"seed": chat.seed, "attempt": chat.attempt})
            case "replies":
                return await _replies(chat, int(argument))
            case "parallel":
                await asyncio.gather(*(chat.reply() for _ in range(int(argument))))
                return 1.0
            case "fail":  # until it was begun so often
                text = (await chat.reply()).text
                if chat.attempt < int(argument):
                    raise ValueError(f"not yet at attempt {chat.attempt}")
                return Outcome(1.0, {"seed": chat.seed, "length": len(text)})
            case "until":
                await chat.reply()
                while not Path(argument).exists():
                    await asyncio.sleep(0.01)
                return 1.0
            case "late":
                await chat.reply()
                self._late = asyncio.create_task(_ask_later(chat, Path(argument)))
                return 1.0
            case "meet":
                await self._meet(int(argument))
                return 1.0
            case "wait":
                await asyncio.Event().wait()
            case "stubborn":
                await _never_end()
            case "clean_up":
                await _clean_up(Path(argument))
        return obey(order, argument)

    async def _meet(self, num_all: int) -> None:
        self._num_met += 1
        if self._num_met == num_all:
            self._all_met.set()
        await self._all_met.wait()


class Plain(Environment):
    """The same in a thread."""

    def rollout(self, chat: BlockingChat, ticket: Ticket) -> Any:  # type: ignore[override]
        order, _, argument = ticket.reference["do"].partition(" ")
        match order:
            case "reply":
                return float(chat.reply().text)
            case "thread":
                return float(threading.current_thread() is not threading.main_thread())
            case "ask":
                while True:
                    chat.reply()
        return obey(order, argument)


class Entered(Environment):
    """An asynchronous context manager: notes in the file `path` when it is entered and left."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)

    async def __aenter__(self) -> "Entered":
        with self._path.open("a") as file:
            file.write("entered\n")
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._path.open("a") as file:
            file.write("left\n")


class Closed(Environment):
    """Cannot be entered."""

    async def __aenter__(self) -> None:
        raise RuntimeError("the server of the environment is down")

    async def __aexit__(self, *_: object) -> None: ...


class Unloadable(Environment):
    def __init__(self) -> None:
        raise RuntimeError("the environment's data are lost")


def obey(order: str, argument: str) -> Any:
    match order:
        case "spy":
            return spy(Path(argument))
        case "pid":
            return os.getpid()
        case "print":
            return chatter()
        case "raise":
            raise ValueError("\ud800 is no text")
        case "hang":
            threading.Event().wait()
        case "hang_with_child":
            hang_with_child(argument)
        case "fork":
            return fork()
        case "eat":
            eat_memory()
        case "exit":
            os._exit(7)
        case "leave":
            sys.exit("enough")
        case "return":
            return RETURNED[argument]
    return float(order)


def hang_with_child(fifo: str) -> None:
    """The child holds `fifo` open for as long as it lives."""
    with Path(fifo).open("wb") as held:
        subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"], stdout=held)
    threading.Event().wait()


def fork() -> float:
    """Its child lives on, and says what it can on every descriptor that it has inherited."""
    if os.fork() == 0:
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b"\x00\x00\x00\x01!")
            except OSError:
                continue
        signal.pause()
    return 1.0


async def _replies(chat: Chat, count: int) -> float:
    """Asks so often, whatever comes."""
    for _ in range(count):
        await chat.reply("Go on.")
    return float(count)


async def _ask_later(chat: Chat, noted: Path) -> None:
    """After the episode is over."""
    while True:
        try:
            await chat.reply()
        except ChatError as error:
            noted.write_text(str(error))
            return


async def _never_end() -> None:
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue


async def _clean_up(path: Path) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)
        path.write_text("clean")
