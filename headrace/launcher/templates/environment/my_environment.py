"""An environment of your own: a game of several turns between the model and this code."""

import random
import re
from collections.abc import Iterator

from headrace.common.environments import Chat
from headrace.common.tasks import Outcome, Prompt, Split
from headrace.common.wire import Ticket

PLAYERS = {"train": ("Ada", "Ben", "Chen"), "held_out": ("Dana", "Emil")}


class MyEnvironment:
    def __init__(self, largest: int = 63) -> None:
        """The arguments come from `task.settings` in the recipe."""
        self.largest = largest

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        """Yields one epoch of prompts: in the same order for the same arguments, and no prompt in both splits."""
        games = [(player, secret) for player in PLAYERS[split] for secret in range(1, self.largest + 1)]
        random.Random(f"{seed} {split} {epoch if split == 'train' else 0}").shuffle(games)
        for player, secret in games:
            question = f"Lena thinks of a number from 1 to {self.largest}. {player} guesses."
            yield Prompt(messages=[{"role": "user", "content": question}], reference={"secret": secret})

    async def rollout(self, chat: Chat, ticket: Ticket) -> Outcome:
        """Plays one game. Returns a finite number as the reward, and what else is worth a curve."""
        secret = ticket.reference["secret"]
        num_guesses = 0
        reply = await chat.reply()
        while (guess := number_in(reply.text)) is not None:
            num_guesses += 1
            if guess == secret:
                break
            reply = await chat.reply("higher" if secret > guess else "lower")
        return Outcome(float(guess == secret), {"guesses": num_guesses})


def number_in(text: str) -> int | None:
    """The last number of a reply. At a limit of the episode a reply is empty, so that the game ends."""
    numbers = re.findall(r"\d+", text)
    return int(numbers[-1]) if numbers else None
