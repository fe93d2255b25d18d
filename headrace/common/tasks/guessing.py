"""The task of several turns: find a secret number from the answers `higher` and `lower`.

The number is one of `NUMBERS`, and the policy has `NUM_GUESSES` guesses, which suffice for whoever always guesses the
middle of what is left. The reward is 1 for the right number and 0 otherwise. The secret is the ticket's, so that all
episodes of a group look for the same number. A hash of the two players decides whether their games are held out: a
prompt is never in both splits, and every number is a secret in both.
"""

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

from headrace.common.environments import Chat
from headrace.common.tasks import Outcome, Prompt, Split
from headrace.common.tasks.arithmetic import NAMES
from headrace.common.wire import Ticket

NUMBERS = range(1, 64)
NUM_GUESSES = 6
HELD_OUT_SHARE = 1 / 4


@dataclass(frozen=True)
class Game:
    thinker: str
    guesser: str
    secret: int

    @property
    def is_held_out(self) -> bool:
        return zlib.crc32(f"{self.thinker} {self.guesser}".encode()) < HELD_OUT_SHARE * 2**32

    @property
    def prompt(self) -> Prompt:
        """The question, and the secret as the reference."""
        numbers = f"from {NUMBERS[0]} to {NUMBERS[-1]}"
        question = f"{self.thinker} thinks of a number {numbers}. {self.guesser} guesses."
        return Prompt([{"role": "user", "content": question}], {"secret": self.secret})


class Guessing:
    """The task named `guessing`."""

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        """An epoch has every training game once. `held_out` is one fixed list: it ignores `seed` as well."""
        games = train_games(seed=seed, epoch=epoch) if split == "train" else held_out_games()
        return (game.prompt for game in games)

    async def rollout(self, chat: Chat, ticket: Ticket) -> Outcome:
        """A reply that is not a number ends the episode.

        Metrics: `guesses`, how many there were; `consistent`, the share of them that earlier answers left possible.
        """
        secret = ticket.reference["secret"]
        guesses: list[int] = []
        possible, num_consistent = NUMBERS, 0
        reply = await chat.reply()
        while (guess := guess_in(reply.text)) is not None:
            guesses.append(guess)
            num_consistent += guess in possible
            if guess == secret or len(guesses) == NUM_GUESSES:
                break
            possible = remaining(possible, guess, secret)
            reply = await chat.reply(answer(guess, secret))
        metrics = {"guesses": float(len(guesses)), "consistent": num_consistent / max(1, len(guesses))}
        return Outcome(float(guess == secret), metrics)


def guess_in(text: str) -> int | None:
    """The number that a reply consists of; None if it is anything else."""
    return int(text) if re.fullmatch(r"[0-9]{1,3}", text) else None


def answer(guess: int, secret: int) -> str:
    """To a guess that is not the secret."""
    return "higher" if secret > guess else "lower"


def remaining(possible: range, guess: int, secret: int) -> range:
    """Those of the possible numbers that the answer to a guess leaves."""
    if secret > guess:
        return range(max(possible.start, guess + 1), possible.stop)
    return range(possible.start, min(possible.stop, guess))


def train_games(*, seed: int, epoch: int) -> list[Game]:
    return _shuffled(random.Random(f"train {seed} {epoch}"), are_held_out=False)


def held_out_games() -> list[Game]:
    return _shuffled(random.Random("held_out"), are_held_out=True)


def _shuffled(rng: random.Random, *, are_held_out: bool) -> list[Game]:
    every = [Game(*players, secret) for players in permutations(NAMES, 2) for secret in NUMBERS]
    games = [game for game in every if game.is_held_out == are_held_out]
    rng.shuffle(games)
    return games
