"""The policy of the task `guessing`: it knows three players' strategies, and mostly takes one of the two bad ones.

A player keeps to a strategy for a whole game, so that reinforcement learning can find the one that pays.
"""

import random
from collections.abc import Callable, Iterator
from itertools import count

from headrace.common.tasks.guessing import NUM_GUESSES, NUMBERS, Game, answer, remaining, train_games
from headrace.common.wire import Message
from headrace.learner.demo_policy.conversations import Conversation
from headrace.learner.demo_policy.recipe import CHAT_TEMPLATE, WHOLE_NUMBERS, Recipe

Player = Callable[[range, random.Random], int]
"""Makes a guess, from the numbers that the answers so far leave possible; its random numbers are its own."""


def bisect(possible: range, _: random.Random) -> int:
    return possible[len(possible) // 2]


def count_up(possible: range, _: random.Random) -> int:
    return possible[0]


def forget(_: range, rng: random.Random) -> int:
    """Any number, whatever the answers were."""
    return rng.choice(NUMBERS)


SHARES: dict[Player, float] = {bisect: 0.1, count_up: 0.4, forget: 0.5}
"""How often each plays. Greedy sampling counts up at first, since that is the most likely way to begin."""


def conversations(seed: int) -> Iterator[Conversation]:
    rng = random.Random(f"players {seed}")
    for epoch in count():
        for game in train_games(seed=seed, epoch=epoch):
            (player,) = rng.choices(list(SHARES), list(SHARES.values()))
            yield Conversation(game.prompt.messages + list(_play(game, player, rng)))


def _play(game: Game, player: Player, rng: random.Random) -> Iterator[Message]:
    """The messages of a game behind its question."""
    possible = NUMBERS
    for num_left in reversed(range(NUM_GUESSES)):
        guess = player(possible, rng)
        yield {"role": "assistant", "content": str(guess)}
        if guess == game.secret or num_left == 0:
            return
        yield {"role": "user", "content": answer(guess, game.secret)}
        possible = remaining(possible, guess, game.secret)


def _texts() -> Iterator[str]:
    for game in train_games(seed=0, epoch=0):
        yield game.prompt.messages[0]["content"]
        yield from ("higher", "lower", str(game.secret))


GUESSING = Recipe(
    task="guessing",
    conversations=conversations,
    texts=_texts,
    token_boundaries=WHOLE_NUMBERS,
    chat_template=CHAT_TEMPLATE,
    num_steps=600,
    batch_size=32,
    learning_rate=3e-3,
    settings={"shares": {player.__name__: share for player, share in SHARES.items()}},
)
