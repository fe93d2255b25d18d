"""The real SGLang computes the logits of a bfloat16 model in float32."""

import asyncio
from pathlib import Path

import httpx
import numpy as np
import pytest

from headrace.common.config import EngineConfig
from headrace.generation.engine.server import EngineServer
from tests.support.guard import GUARD_S

PROMPTS = [[5, 6, 7, 8, 9, 10, token] for token in range(20, 28)]
STEP = 1 / 64
"""Between two bfloat16 numbers from 2 to 4, and a divisor of what is between larger ones."""


@pytest.mark.slow
def test_logits_are_not_rounded_to_bfloat16(demo_policy: Path, tmp_path: Path) -> None:
    """The likeliest tokens' logits are 2 to 16. If the model rounded them, 99.9 % of their differences would be
    multiples of 1/64; by chance 2 % are."""
    server = EngineServer(EngineConfig(device="cpu", context_tokens=256), "bfloat16", tmp_path / "sglang.log")

    async def differences() -> np.ndarray:
        await server.start(demo_policy, 1)
        try:
            sampling = {"max_new_tokens": 32, "temperature": 1.0, "ignore_eos": True}
            asked = {"input_ids": PROMPTS, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 5}
            async with httpx.AsyncClient(trust_env=False, timeout=GUARD_S) as http:
                answer = await http.post(f"{server.url}/generate", json=asked)
            tops = [place for one in answer.json() for place in one["meta_info"]["output_top_logprobs"]]
            logprobs = np.array([[logprob for logprob, *_ in top] for top in tops])
            return np.asarray(logprobs[:, :1] - logprobs[:, 1:])
        finally:
            await server.stop()

    in_steps = asyncio.run(differences()) / STEP
    assert in_steps.shape == (len(PROMPTS) * 32, 4)
    assert np.mean(np.abs(in_steps - np.round(in_steps)) < 0.01) < 0.2
