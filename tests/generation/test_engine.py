"""The engine's client against the real SGLang on a CPU: sampling, swaps in flight, broken weights, cancellation.

The policies have random weights that never choose the end token, so that a completion lasts as long as it may.
Their log-probabilities are compared with those of transformers in float32.
"""

import asyncio
import itertools
import json
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from headrace.common.config import EngineConfig
from headrace.common.wire import Sampling, Ticket
from headrace.generation.engine.client import Engine, EngineError, UnconfirmedWeights
from headrace.generation.engine.completions import Completion, Sample, generate_body
from headrace.generation.engine.server import EngineServer
from headrace.generation.tensors.verification import map_to_checkpoint
from tests.support.guard import GUARD_S

Result = TypeVar("Result")

PROMPT = list(range(40, 60))
"""Any tokens will do, because the weights are random."""
IN_FLIGHT = 600
"""Tokens of a completion that must still be running when a test has seen it: these take seconds, but 100 can end before
a loaded machine polls."""
ticket_numbers = itertools.count()


def ticket(num_completions: int = 8, max_new_tokens: int = 24, prompt: list[int] = PROMPT, **sampling: Any) -> Ticket:
    return Ticket(
        id=f"0-{next(ticket_numbers)}",
        kind="train",
        prompt_tokens=prompt,
        messages=[],
        reference={},
        num_completions=num_completions,
        sampling=Sampling(
            temperature=sampling.get("temperature", 1.0),
            max_new_tokens=max_new_tokens,
            stop_token_ids=sampling.get("stop_token_ids", []),
            stop=sampling.get("stop", []),
        ),
        min_weight_version=0,
    )


def write_endless_policy(demo_policy: Path, folder: Path, seed: int) -> Path:
    """Writes random weights of the demo policy's shapes into a folder that has only the safetensors file.

    The first hidden unit is large and positive after every token but the end token, whose logit it lowers.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in load_file(demo_policy / "model.safetensors").items():
        is_norm = tensor.ndim == 1
        weights[name] = torch.ones(tensor.shape) if is_norm else 0.08 * torch.randn(tensor.shape, generator=generator)
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0] = 3.0
    embedding[json.loads((demo_policy / "config.json").read_text())["eos_token_id"], 0] = -3.0
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def policies(demo_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders with different weights."""
    root = tmp_path_factory.mktemp("policies")
    return [write_endless_policy(demo_policy, root / f"seed-{seed}", seed) for seed in (1, 2)]


def run(url: str, body: Callable[[Engine], Awaitable[Result]], **settings: Any) -> Result:
    async def with_engine() -> Result:
        engine = Engine(url, **settings)
        try:
            return await body(engine)
        finally:
            await engine.aclose()

    return asyncio.run(asyncio.wait_for(with_engine(), GUARD_S))


async def next_version(engine: Engine) -> int:
    version = await engine.weight_version()
    assert version is not None
    return version + 1


async def until_running(engine: Engine, num_requests: int) -> None:
    """Waits until the engine reports that it decodes `num_requests` completions."""
    deadline_s = time.monotonic() + GUARD_S
    async with httpx.AsyncClient(base_url=engine.url, trust_env=False, timeout=GUARD_S) as http:
        while (running := (await http.get("/v1/loads")).json()["loads"][0]["num_running_reqs"]) != num_requests:
            assert time.monotonic() < deadline_s, f"{running} requests run, expected {num_requests}"
            await asyncio.sleep(0.02)


def reference_logprobs(
    demo_policy: Path, weights: Path, tokens: list[int], temperature: float = 1.0, prompt: list[int] = PROMPT
) -> np.ndarray:
    """Log-probabilities of `tokens` after the prompt, by transformers in float32, `(len(tokens),)`."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo_policy)).float()
    missing = model.load_state_dict(load_file(weights / "model.safetensors"), strict=False).missing_keys
    assert missing == ["lm_head.weight"], "the head is tied to the embedding"
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()


def expect_whole(completion: Completion) -> None:
    """Checks that all parts of the completion have the same length."""
    assert len(completion.tokens) == len(completion.behaviour_logprobs)
    assert completion.behaviour_logprobs.dtype == np.float32
    edges = [0, *(span.end for span in completion.version_spans)]
    assert [span.start for span in completion.version_spans] == edges[:-1]
    assert edges[-1] == len(completion.tokens)


def test_one_and_eight_completions_end_at_their_length(engine_url: str, policies: list[Path]) -> None:
    async def body(engine: Engine) -> None:
        version = await next_version(engine)
        await engine.swap(policies[0], version)
        for num_completions in (1, 8):
            completions = await engine.generate(ticket(num_completions, max_new_tokens=12))
            assert len(completions) == num_completions
            assert len({tuple(completion.tokens) for completion in completions}) == num_completions
            for completion in completions:
                expect_whole(completion)
                assert (completion.finish_reason, len(completion.tokens)) == ("length", 12)
                assert [span.version for span in completion.version_spans] == [version]

    run(engine_url, body)


def test_groups_with_a_common_prefix_get_correct_logprobs(
    engine_url: str, demo_policy: Path, policies: list[Path]
) -> None:
    prompts = [PROMPT, [*PROMPT[:12], 300, 301], PROMPT[:5], [*PROMPT, 7]]

    async def body(engine: Engine) -> list[list[Completion]]:
        await engine.swap(policies[0], await next_version(engine))
        tickets = [ticket(4, max_new_tokens=16, prompt=prompt) for prompt in prompts]
        return await asyncio.gather(*(engine.generate(one) for one in tickets))

    for prompt, completions in zip(prompts, run(engine_url, body), strict=True):
        for completion in completions:
            expected = reference_logprobs(demo_policy, policies[0], completion.tokens, prompt=prompt)
            assert np.abs(expected - completion.behaviour_logprobs).max() < 1e-4


def test_a_stop_token_ends_a_completion_and_is_its_last_token(engine_url: str, policies: list[Path]) -> None:
    stop_token_ids = list(range(200, 300))

    async def body(engine: Engine) -> list[Completion]:
        await engine.swap(policies[0], await next_version(engine))
        return await engine.generate(ticket(8, max_new_tokens=200, stop_token_ids=stop_token_ids))

    for completion in run(engine_url, body):
        expect_whole(completion)
        assert completion.finish_reason == "stop"
        assert completion.tokens[-1] in stop_token_ids
        assert not set(completion.tokens[:-1]) & set(stop_token_ids)


def test_a_stop_text_ends_a_completion_and_all_sampled_tokens_are_kept(
    engine_url: str, demo_policy: Path, policies: list[Path]
) -> None:
    """The tokens include the one that completes the text, with its log-probability; the reward's text has it, too."""
    stop = ["7", "=", "ar", " w"]
    tokenizer = AutoTokenizer.from_pretrained(demo_policy)

    async def body(engine: Engine) -> list[Completion]:
        await engine.swap(policies[0], await next_version(engine))
        return await engine.generate(ticket(16, max_new_tokens=300, stop=stop))

    for completion in run(engine_url, body):
        expect_whole(completion)
        assert completion.finish_reason == "stop"
        text, before = tokenizer.decode(completion.tokens), tokenizer.decode(completion.tokens[:-1])
        assert any(one in text for one in stop) and not any(one in before for one in stop)
        read = tokenizer.decode(completion.tokens, skip_special_tokens=True)
        assert completion.text[-5:] == read[-5:], "nothing is cut off"
        expected = reference_logprobs(demo_policy, policies[0], completion.tokens)
        assert np.abs(expected - completion.behaviour_logprobs).max() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_swap_in_flight_keeps_tokens_and_logprobs_right_on_both_sides(
    engine_url: str, demo_policy: Path, policies: list[Path], temperature: float
) -> None:
    async def body(engine: Engine) -> tuple[int, list[Completion]]:
        version = await next_version(engine)
        await engine.swap(policies[0], version)
        request = asyncio.create_task(engine.generate(ticket(8, max_new_tokens=IN_FLIGHT, temperature=temperature)))
        await until_running(engine, 8)
        await engine.swap(policies[1], version + 1)
        return version, await request

    version, completions = run(engine_url, body)
    for completion in completions:
        expect_whole(completion)
        assert len(completion.tokens) == IN_FLIGHT
        assert [span.version for span in completion.version_spans] == [version, version + 1]
    for completion in completions[:2]:
        for policy, span in zip(policies, completion.version_spans, strict=True):
            expected = reference_logprobs(demo_policy, policy, completion.tokens, temperature)
            error = np.abs(expected - completion.behaviour_logprobs)
            assert error[span.start : span.end].max() < 1e-4
            assert np.delete(error, slice(span.start, span.end)).max() > 1e-2  # the other tokens are another policy's


def broken_folders(policy: Path, root: Path) -> dict[str, Path]:
    weights = load_file(policy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"

    def folder(fault: str) -> Path:
        (root / fault).mkdir()
        return root / fault

    save_file(weights | {name: weights[name][:, :-1].contiguous()}, folder("shape") / "model.safetensors")
    save_file({key: weights[key] for key in weights if key != name}, folder("missing") / "model.safetensors")
    whole = (policy / "model.safetensors").read_bytes()
    (folder("torn") / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder("garbage") / "model.safetensors").write_bytes(b"\xff" * 4096)
    (folder("void") / "model.safetensors").write_bytes(b"")
    folder("empty")
    return {path.name: path for path in root.iterdir()} | {"nowhere": root / "nowhere"}


def test_broken_weights_are_refused_and_generation_continues(
    engine_url: str, policies: list[Path], tmp_path: Path
) -> None:
    async def body(engine: Engine) -> tuple[int, list[Completion]]:
        version = await next_version(engine)
        await engine.swap(policies[0], version)
        request = asyncio.create_task(engine.generate(ticket(4, max_new_tokens=IN_FLIGHT)))
        await until_running(engine, 4)
        for fault, folder in broken_folders(policies[1], tmp_path).items():
            with pytest.raises(EngineError, match=f"/{fault}"):
                await engine.swap(folder, version + 1)
            assert await engine.weight_version() == version
        return version, await request

    version, completions = run(engine_url, body)
    assert [[span.version for span in completion.version_spans] for completion in completions] == [[version]] * 4


def test_a_load_that_the_engine_refuses_is_reported_until_a_later_swap_is_confirmed(
    engine_url: str, policies: list[Path], tmp_path: Path
) -> None:
    """The tensors are whole, but the index beside them names no existing file."""
    folder = tmp_path / "misled"
    shutil.copytree(policies[1], folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))

    async def body(engine: Engine) -> None:
        version = await next_version(engine)
        await engine.swap(policies[0], version)
        with pytest.raises(EngineError, match=r"/update_weights_from_disk answered 400: .*[Ww]eights"):
            await engine.swap(folder, version + 1)
        assert await engine.weight_version() == version
        with pytest.raises(UnconfirmedWeights, match="may hold other weights than it reports"):
            await engine.generate(ticket(1))
        await engine.swap(policies[1], version + 1)
        [completion] = await engine.generate(ticket(1))
        assert [span.version for span in completion.version_spans] == [version + 1]

    run(engine_url, body)


def test_an_engine_that_loaded_half_of_a_version_is_detected(
    engine_url: str, policies: list[Path], tmp_path: Path
) -> None:
    """All tensors exist, in two files, but the index names only one: SGLang loads that one and reports success. Without
    the index it loads both."""
    weights = load_file(policies[1] / "model.safetensors")
    halves = sorted(weights)[::2], sorted(weights)[1::2]
    for number, names in enumerate(halves):
        save_file({name: weights[name] for name in names}, tmp_path / f"model-{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(halves[0], "model-0.safetensors")}))

    async def body(engine: Engine) -> None:
        version = await next_version(engine)
        await engine.swap(policies[0], version)
        with pytest.raises(EngineError, match=r"it holds other bytes for \d+ of \d+ tensors"):
            await engine.swap(tmp_path, version + 1)
        assert engine.has_unverified_weights and await engine.weight_version() == version + 1
        index.unlink()
        await engine.swap(tmp_path, version + 2)
        [completion] = await engine.generate(ticket(1))
        assert [span.version for span in completion.version_spans] == [version + 2]

    run(engine_url, body)


def test_an_abort_ends_a_request_in_the_engine(engine_url: str, policies: list[Path]) -> None:
    """The connection stays open: SGLang ends the requests of a closed one without an abort, after 4 s."""

    async def body(engine: Engine) -> None:
        await engine.swap(policies[0], await next_version(engine))
        rids = [f"{uuid.uuid4().hex}-{index}." for index in range(8)]
        asked = generate_body(ticket(8, max_new_tokens=900), rids)
        request = asyncio.create_task(engine.generate_unchecked(asked, list[Sample]))
        await until_running(engine, 8)
        await engine._abort(rids)
        assert [sample.meta_info.finish_reason.type for sample in await request] == ["abort"] * 8

    run(engine_url, body)


def test_cancelling_and_running_out_of_time_end_the_request(engine_url: str, policies: list[Path]) -> None:
    async def body(engine: Engine) -> None:
        await engine.swap(policies[0], await next_version(engine))
        request = asyncio.create_task(engine.generate(ticket(8, max_new_tokens=900)))
        await until_running(engine, 8)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await until_running(engine, 0)

        impatient = Engine(engine.url, completion_timeout_s=0.5)
        late = ticket(8, max_new_tokens=900)
        with pytest.raises(
            EngineError, match=rf"ticket {late.id}: the engine answered neither it nor another request within 0\.5 s"
        ):
            await impatient.generate(late)
        await impatient.aclose()
        await until_running(engine, 0)

    run(engine_url, body)


def test_a_refused_request_names_the_ticket(engine_url: str) -> None:
    too_long = ticket(1, max_new_tokens=1_000_000)
    with pytest.raises(EngineError, match=rf"ticket {too_long.id}: /generate answered 400: .*context length"):
        run(engine_url, lambda engine: engine.generate(too_long))


def test_the_server_reports_that_it_is_healthy(engine_server: EngineServer) -> None:
    assert engine_server.is_alive
    assert run(engine_server.url, lambda engine: engine.health())
    log = engine_server.log_path.read_text()
    assert "Failed to apply hooks" not in log, "the hooks make SGLang fast on a CPU"
    assert "Ignore import error" not in log, "for models that were not requested"


def test_an_engine_that_kept_its_weights_under_a_new_label_is_detected(
    engine_url: str, policies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real engine loads its current weights again under a new label."""

    async def body(engine: Engine) -> None:
        version = await next_version(engine)
        await engine.swap(policies[0], version)
        load = engine._swapper._load
        monkeypatch.setattr(engine._swapper, "_load", lambda _, version: load(policies[0], version))
        with pytest.raises(EngineError, match=r"it holds other bytes for \d+ of \d+ tensors"):
            await engine.swap(policies[1], version + 1)
        monkeypatch.undo()
        timings = await engine.swap(policies[1], version + 2)
        print(f"paused {timings.pause_s * 1e3:.0f} ms, confirmed in {timings.confirm_s * 1e3:.0f} ms more")

    run(engine_url, body)


def test_every_tensor_of_the_demo_policy_is_compared(engine_url: str, policies: list[Path]) -> None:
    async def body(engine: Engine) -> int:
        await engine.swap(policies[0], await next_version(engine))
        confirmed = engine._swapper._confirmer._confirmed
        assert confirmed is not None
        given, [held] = confirmed
        parts = map_to_checkpoint(held, given)
        assert parts.keys() == held.keys() and sum(map(len, parts.values())) == len(given)
        return len(held)

    num_fused = 3 * (2 + 1)
    assert run(engine_url, body) == len(load_file(policies[0] / "model.safetensors")) - num_fused


def test_every_request_makes_progress_under_each_version_however_fast_they_come(
    engine_url: str, policies: list[Path]
) -> None:
    """If the next swap began at once, each would get one token per version, that of its recomputation, or none."""

    async def body(engine: Engine) -> list[Completion]:
        version = await next_version(engine)
        await engine.swap(policies[0], version)
        tickets = asyncio.gather(*(engine.generate(ticket(8, max_new_tokens=200)) for _ in range(4)))
        await until_running(engine, 32)
        while not tickets.done():
            version += 1
            await engine.wait_for_progress(await engine.swap(policies[version % 2], version))
        return list(itertools.chain(*await tickets))

    spans = [completion.version_spans for completion in run(engine_url, body)]
    assert sum(len(completion) > 2 for completion in spans) > len(spans) / 2, "a few may end before the first swap"
    assert min(span.end - span.start for completion in spans for span in completion[1:-1]) > 1
    for completion in spans:
        versions = [span.version for span in completion]
        assert versions == list(range(versions[0], versions[-1] + 1)), "it made progress under each"


@pytest.fixture
def in_place_url(demo_policy: Path, tmp_path: Path) -> Iterator[str]:
    """A second engine, started with the arguments that swaps in place need."""
    server = EngineServer(EngineConfig(device="cpu", swap_mode="in_place"), "float32", tmp_path / "sglang.log")
    asyncio.run(server.start(demo_policy, 1))
    yield server.url
    asyncio.run(server.stop())


@pytest.mark.slow
def test_swaps_in_place_label_every_token_correctly_and_leave_no_stale_kv(
    in_place_url: str, demo_policy: Path, policies: list[Path]
) -> None:
    """Tokens before a swap match the old weights exactly. Those after it match no weights, as the KV cache is kept;
    this shows that it was. Completions of the same prompt that begin after the swap match again."""

    async def body(engine: Engine) -> tuple[list[Completion], list[Completion]]:
        await engine.swap(policies[0], 2)
        request = asyncio.create_task(engine.generate(ticket(8, max_new_tokens=IN_FLIGHT)))
        await until_running(engine, 8)
        for version in (3, 4, 5):  # SGLang would refuse to flush a cache with requests in flight
            await engine.swap(policies[version % 2], version)
        later = await engine.generate(ticket(4, max_new_tokens=24))
        return await request, later

    in_flight, later = run(in_place_url, body, swap_mode="in_place")
    for completion in (*in_flight, *later):
        expect_whole(completion)
    assert {len(completion.tokens) for completion in in_flight} == {IN_FLIGHT}
    for completion in in_flight[:4]:
        assert completion.version_spans[0].version == 2
        end = completion.version_spans[0].end
        expected = reference_logprobs(demo_policy, policies[0], completion.tokens, 1.0)
        error = np.abs(expected - completion.behaviour_logprobs)
        assert error[:end].max() < 1e-4
        assert error[end] > 1e-3, "the first token after the swap is another policy's"
        last = completion.version_spans[-1]
        expected = reference_logprobs(demo_policy, policies[last.version % 2], completion.tokens, 1.0)
        assert np.abs(expected - completion.behaviour_logprobs)[last.start :].max() > 1e-3, "its KV was kept"
    for completion in later:
        assert [span.version for span in completion.version_spans] == [5]
        expected = reference_logprobs(demo_policy, policies[1], completion.tokens, 1.0)
        assert np.abs(expected - completion.behaviour_logprobs).max() < 1e-4
    run(in_place_url, lambda engine: engine.swap(policies[0], 6))  # the engine serves the other mode, too


def test_an_engine_with_its_overlap_schedule_is_refused_in_place(engine_url: str, policies: list[Path]) -> None:
    with pytest.raises(EngineError, match=r"swap_mode in_place needs .* has overlap schedule on, radix cache on"):
        run(engine_url, lambda engine: engine.swap(policies[0], 99), swap_mode="in_place")
