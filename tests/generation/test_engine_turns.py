"""Turns against the scripted server: the request, what is refused, and when versions count as confirmed."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from headrace.common.wire import Sampling
from headrace.generation.engine.client import Engine, EngineError, UnconfirmedWeights
from headrace.generation.engine.completions import SampledTurn, TurnRequest, generate_body
from tests.support.factories import SAMPLING, make_ticket
from tests.support.fake_sglang import FakeSglang, sample
from tests.support.guard import GUARD_S

REQUEST = TurnRequest([5, 6, 7], Sampling(0.7, 8, [1], ["\n\n"]), "0-7-3-1")


@pytest.fixture
def turns(fake: FakeSglang) -> FakeSglang:
    fake.replies["/generate"] = 200, sample()
    return fake


def take(fake: FakeSglang, *requests: TurnRequest, timeout_s: float = GUARD_S) -> list[SampledTurn]:
    async def run() -> list[SampledTurn]:
        engine = Engine(fake.url, completion_timeout_s=timeout_s)
        try:
            return [await engine.sample_turn(request) for request in requests]
        finally:
            await engine.aclose()

    return asyncio.run(run())


def test_a_turn_sends_its_tokens_and_every_parameter_of_the_distribution(turns: FakeSglang) -> None:
    [turn] = take(turns, REQUEST)
    [(path, body)] = turns.calls
    assert (path, body["input_ids"], body["rid"], body["return_logprob"]) == ("/generate", [5, 6, 7], "0-7-3-1.", True)
    assert body["sampling_params"] == {
        "temperature": 0.7,
        "max_new_tokens": 8,
        "stop_token_ids": [1],
        "stop_regex": ["(?:\\\n\\\n)"],
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "ignore_eos": False,
        "logit_bias": None,
        "skip_special_tokens": False,
    }
    assert turn.completion.tokens == [9, 1] and turn.completion.behaviour_logprobs.tolist() == [-0.5, -0.25]
    assert (turn.completion.finish_reason, turn.cached_tokens, turn.unconfirmed) == ("stop", 0, None)


def test_the_request_of_a_ticket_is_what_it_always_was() -> None:
    """Byte for byte: single-turn runs are to sample as before."""
    body = generate_body(make_ticket(prompt_tokens=[5, 6], sampling=replace(SAMPLING, stop=["\n\n"])), ["a-0.", "a-1."])
    assert msgspec.json.encode(body).decode() == (
        '{"input_ids":[[5,6],[5,6]],"rid":["a-0.","a-1."],"sampling_params":{"temperature":1.0,"max_new_tokens":16,'
        r'"stop_token_ids":[1],"top_p":1.0,"top_k":-1,"stop_regex":["(?:\\\n\\\n)"]},"return_logprob":true}'
    )


def test_the_engine_says_how_many_tokens_it_had_cached(turns: FakeSglang, tmp_path: Path) -> None:
    longer = REQUEST._replace(prompt_tokens=[5, 6, 7, 9, 1, 20])
    assert [turn.cached_tokens for turn in take(turns, REQUEST, longer, longer)] == [0, 5, 5]


def test_no_more_tokens_are_cached_than_were_sent(turns: FakeSglang) -> None:
    turns.replies["/generate"] = 200, sample(cached_tokens=9)
    assert [turn.cached_tokens for turn in take(turns, REQUEST)] == [3]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prompt_tokens": 2}, "sampled behind 2 tokens, sent 3"),
        ({"finish_reason": {"type": "abort", "message": "Aborted"}}, "finished with abort"),
        ({"output_token_logprobs": [[-0.5, 9, None], [None, 1, None]]}, "not finite"),
        ({"weight_versions": []}, "do not tile 2 tokens"),
    ],
)
def test_an_unusable_turn_names_itself_and_the_problem(
    turns: FakeSglang, changes: dict[str, Any], problem: str
) -> None:
    turns.replies["/generate"] = 200, sample(**changes)
    with pytest.raises(EngineError, match=rf"^turn 0-7-3-1: .*{problem}"):
        take(turns, REQUEST)


def test_a_turn_that_is_out_of_time_is_aborted(turns: FakeSglang) -> None:
    turns.hanging.add("/generate")
    with pytest.raises(EngineError, match=r"turn 0-7-3-1: the engine answered neither it nor another request within"):
        take(turns, REQUEST, timeout_s=0.3)
    assert turns.calls[-1] == ("/abort_request", {"rid": "0-7-3-1."})


def test_an_abort_names_one_turn_and_no_failure_matters(turns: FakeSglang) -> None:
    turns.replies["/abort_request"] = 500, {}

    async def run() -> None:
        engine = Engine(turns.url)
        await engine.abort("0-7-3-1")
        await engine.aclose()

    asyncio.run(run())
    assert turns.calls == [("/abort_request", {"rid": "0-7-3-1."})]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    import numpy as np
    import safetensors.numpy

    folders = [tmp_path / f"v{version}" for version in range(2)]
    for version, folder in enumerate(folders):
        folder.mkdir()
        safetensors.numpy.save_file({"a": np.full(3, version, np.float32)}, folder / "model.safetensors")
    return folders


@pytest.mark.parametrize("keeps_tensors", [False, True])
def test_a_turn_waits_for_no_confirmation_but_its_group_does(
    turns: FakeSglang, folders: list[Path], keeps_tensors: bool
) -> None:
    """A turn that ended before the swap is not in doubt, even if the swap fails."""

    async def scenario() -> None:
        engine = Engine(turns.url)
        await engine.swap(folders[0], 3)
        turns.replies["/generate"] = 200, sample(weight_versions=[{"version": "3", "start": 0, "end": 2}])
        earlier = await engine.sample_turn(REQUEST)
        turns.replies["/generate"] = 200, sample()
        turns.keeps_tensors = keeps_tensors
        turns.calls.clear()
        turns.delaying["/weights_checker"] = confirming = threading.Event()
        swapping = asyncio.create_task(engine.swap(folders[1], 4))
        while "/weights_checker" not in turns.paths:
            await asyncio.sleep(0.01)
        turn = await engine.sample_turn(REQUEST)
        assert earlier.unconfirmed is None
        assert turn.unconfirmed is not None and turn.unconfirmed.versions == {4}
        waiting = asyncio.create_task(engine.wait_until_confirmed([earlier, turn]))
        await asyncio.sleep(0)
        assert not waiting.done()
        confirming.set()
        if keeps_tensors:
            with pytest.raises(EngineError, match="other bytes"):
                await swapping
            with pytest.raises(UnconfirmedWeights, match="has not been confirmed"):
                await waiting
            await engine.wait_until_confirmed([earlier])
            with pytest.raises(UnconfirmedWeights, match="may hold other weights"):
                await engine.sample_turn(REQUEST)
        else:
            await swapping
            await waiting
        await engine.aclose()

    asyncio.run(scenario())


def test_a_turn_during_which_a_swap_failed_is_refused(turns: FakeSglang, folders: list[Path]) -> None:
    """Whatever its versions are: the engine may have sampled it with any weights."""

    async def scenario() -> None:
        engine = Engine(turns.url)
        await engine.swap(folders[0], 4)
        turns.delaying["/generate"] = answering = threading.Event()
        in_flight = asyncio.create_task(engine.sample_turn(REQUEST))
        while "/generate" not in turns.paths:
            await asyncio.sleep(0.01)
        turns.fails_halfway = True
        with pytest.raises(EngineError, match="Rolling back"):
            await engine.swap(folders[1], 5)
        answering.set()
        with pytest.raises(UnconfirmedWeights, match="a swap failed during the request"):
            await in_flight
        await engine.aclose()

    asyncio.run(scenario())
