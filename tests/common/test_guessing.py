"""The guessing task: what it holds out, how a game goes, and what it rewards."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.common.environments import Chat
from headrace.common.tasks import Outcome, load_task
from headrace.common.tasks.guessing import (
    NUM_GUESSES,
    NUMBERS,
    Game,
    Guessing,
    held_out_games,
    remaining,
    train_games,
)
from tests.support.factories import make_ticket


def play(replies: Sequence[str], secret: int = 21) -> tuple[Outcome, list[str]]:
    """The outcome of an episode in which the model writes `replies`, then reaches a limit; and all messages' texts."""
    prompt, script = Game("Ada", "Ben", secret).prompt, iter(replies)

    async def send(body: dict[str, Any]) -> Any:
        text = next(script, None)
        message = {"role": "assistant", "content": text}
        return "max_turns" if text is None else {"message": message, "finish_reason": "stop"}

    chat = Chat(send, prompt.messages, base_url="", api_key="", model="")
    ticket = make_ticket(messages=prompt.messages, reference=prompt.reference)
    outcome = asyncio.run(Guessing().rollout(chat, ticket))
    return outcome, [message["content"] for message in chat.messages]


def test_a_found_number_is_rewarded() -> None:
    outcome, texts = play(["32", "16", "24", "20", "22", "21"])
    assert texts == [
        "Ada thinks of a number from 1 to 63. Ben guesses.",
        *("32", "lower", "16", "higher", "24", "lower", "20", "higher", "22", "lower", "21"),
    ]
    assert outcome == Outcome(1.0, {"guesses": 6.0, "consistent": 1.0})


def test_a_number_that_is_not_found_is_not_rewarded_and_no_seventh_guess_is_asked_for() -> None:
    outcome, texts = play(["1", "2", "3", "4", "5", "6", "21"])
    assert outcome == Outcome(0.0, {"guesses": 6.0, "consistent": 1.0})
    assert texts[-1] == "6"


def test_a_guess_that_the_answers_excluded_is_not_consistent() -> None:
    outcome, _ = play(["32", "40", "32", "21"])  # lower, lower, lower
    assert outcome == Outcome(1.0, {"guesses": 4.0, "consistent": 0.5})


@pytest.mark.parametrize("reply", ["", "x", "-1", "2 1", " 21", "21.", "٢١", "0021", "twenty-one"])
def test_a_reply_that_is_no_number_ends_the_episode(reply: str) -> None:
    outcome, texts = play(["32", reply, "21"])
    assert outcome == Outcome(0.0, {"guesses": 1.0, "consistent": 1.0})
    assert texts[-1] == reply


def test_a_limit_ends_the_episode() -> None:
    assert play(["32"])[0].reward == 0.0
    assert play([])[0] == Outcome(0.0, {"guesses": 0.0, "consistent": 0.0})


def test_a_number_outside_the_range_is_answered() -> None:
    outcome, texts = play(["99", "0", "21"])
    assert texts[1:] == ["99", "lower", "0", "higher", "21"]
    assert outcome == Outcome(1.0, {"guesses": 3.0, "consistent": 1 / 3})


@given(st.sampled_from(NUMBERS))
def test_the_guesses_suffice_for_whoever_bisects(secret: int) -> None:
    possible, guesses = NUMBERS, list[int]()
    while not guesses or guesses[-1] != secret:
        guesses.append(possible[len(possible) // 2])
        possible = remaining(possible, guesses[-1], secret)
    assert len(guesses) <= NUM_GUESSES
    assert play([str(guess) for guess in guesses], secret)[0].reward == 1.0


@given(st.lists(st.sampled_from(NUMBERS)), st.sampled_from(NUMBERS))
def test_what_remains_is_what_the_answers_allow(guesses: list[int], secret: int) -> None:
    possible = NUMBERS
    wrong = [guess for guess in guesses if guess != secret]
    for guess in wrong:
        possible = remaining(possible, guess, secret)
    allowed = [number for number in NUMBERS if all((number > guess) == (secret > guess) for guess in wrong)]
    assert [number for number in allowed if number not in wrong] == list(possible)


def test_no_prompt_is_in_both_splits_and_every_number_is_a_secret_in_both() -> None:
    train, held_out = train_games(seed=0, epoch=0), held_out_games()
    assert not {game.prompt.messages[0]["content"] for game in train} & {
        game.prompt.messages[0]["content"] for game in held_out
    }
    assert {game.secret for game in train} == {game.secret for game in held_out} == set(NUMBERS)
    assert len(set(train)) == len(train) > 3 * len(set(held_out)) > 3 * 1024


def test_held_out_is_one_fixed_list_and_train_depends_on_seed_and_epoch() -> None:
    task = load_task("guessing", {})
    held_out = list(task.prompts("held_out", seed=0, epoch=0))
    assert held_out == list(task.prompts("held_out", seed=7, epoch=3))
    # Fixed across processes and versions of the code: recorded evaluations refer to these very games.
    assert held_out[0] == Game("Lena", "Jonas", 53).prompt

    def train(seed: int, epoch: int) -> list[Any]:
        return list(task.prompts("train", seed=seed, epoch=epoch))

    assert train(1, 0) == train(1, 0)
    assert train(1, 0) != train(2, 0)
    assert train(1, 0) != train(1, 1)
