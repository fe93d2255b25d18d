"""Questions without a reference answer: a judge scores completions by a rubric.

The judge is any model behind an OpenAI-compatible endpoint (`POST /v1/chat/completions`), such as a second SGLang. A
group's completions are judged at the same time. A reply without a score is an error, never a reward of 0: the
completion is judged again, then its ticket is tried again.
"""

import json
import os
import re
import string
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from headrace.common.tasks import BadRow, Prompt, Split
from headrace.common.wire import Ticket

if TYPE_CHECKING:
    import httpx

RUBRIC = """Judge the answer to the question. Consider whether it is right, complete and clear.

Question:
{question}

Answer:
{completion}

Explain your judgement in one sentence. Then end with a line `Score: N`, where N is from 0 (useless) to 10 (perfect)."""
SCORE = r"[Ss]core:\s*(\d+(?:\.\d+)?)"


class Judged:
    """Questions from JSONL files; the reward is the judge's score divided by `max_score`, from 0 to 1.

    Each row of `train_path` and `held_out_path` has a text `question`. `rubric` is the message to the judge: it names
    `{completion}`, and fields of the row such as `{question}`. `score_pattern` is a regular expression; its last match
    in the judge's reply counts, and its first group is the score. The key of the endpoint, if it needs one, is in the
    environment variable `api_key_variable` of the replicas.
    """

    def __init__(
        self,
        train_path: str,
        held_out_path: str,
        judge_url: str,
        judge_model: str = "default",
        rubric: str = RUBRIC,
        score_pattern: str = SCORE,
        max_score: float = 10.0,
        max_tokens: int = 512,
        api_key_variable: str = "JUDGE_API_KEY",
    ) -> None:
        if max_score <= 0:
            raise ValueError(f"max_score {max_score}: expected a number above 0")
        try:
            self._pattern = re.compile(score_pattern)
            self._fields = {field for _, field, _, _ in string.Formatter().parse(rubric) if field is not None}
        except (re.error, ValueError) as error:
            raise ValueError(f"score_pattern {score_pattern!r} or rubric: {error}") from error
        if self._pattern.groups < 1 or "completion" not in self._fields:
            raise ValueError("expected a group for the score in score_pattern, and {completion} in the rubric")
        self._paths: dict[Split, str] = {"train": train_path, "held_out": held_out_path}
        self._url, self._rubric, self._max_score = judge_url.rstrip("/"), rubric, max_score
        self._request = {"model": judge_model, "temperature": 0.0, "max_tokens": max_tokens}
        self._api_key_variable = api_key_variable

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt | BadRow]:
        """`train` shuffled by (seed, epoch); `held_out` in file order. Raises `ValueError` if there is no such file."""
        path = self._paths[split]
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{split}_path {path!r}: expected a file of JSONL: {error}") from error
        prompts = [self._prompt(line, f"{path!r}, line {number}") for number, line in enumerate(lines, 1)]
        if split == "held_out":
            return iter(prompts)
        return (prompts[index] for index in np.random.default_rng([seed, epoch]).permutation(len(prompts)))

    def _prompt(self, line: str, origin: str) -> Prompt | BadRow:
        try:
            row = json.loads(line)
        except ValueError as error:
            return BadRow(f"{origin}: {error}")
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            return BadRow(f"{origin}: expected an object with a text 'question', found {line[:80]!r}")
        if missing := self._fields - row.keys() - {"completion"}:
            return BadRow(f"{origin}: the rubric names {sorted(missing)}, which the row lacks")
        return Prompt([{"role": "user", "content": row["question"]}], row)

    async def reward(self, completion: str, ticket: Ticket) -> float:
        """The judge's score. Raises if the endpoint fails, or its reply has no score from 0 to `max_score`."""
        content = self._rubric.format(**{**ticket.reference, "completion": completion})
        body = self._request | {"messages": [{"role": "user", "content": content}]}
        reply = await self._client.post(f"{self._url}/v1/chat/completions", json=body)
        reply.raise_for_status()
        text: str = reply.json()["choices"][0]["message"]["content"] or ""
        scores = [float(match[1]) for match in self._pattern.finditer(text)]
        if not scores or not 0 <= scores[-1] <= self._max_score:
            raise ValueError(f"expected a score from 0 to {self._max_score:g} of the judge, found {text[-200:]!r}")
        return scores[-1] / self._max_score

    @cached_property
    def _client(self) -> "httpx.AsyncClient":
        """Without a timeout of its own: `generation.reward_deadline_s` counts."""
        import httpx

        key = os.environ.get(self._api_key_variable)
        return httpx.AsyncClient(timeout=None, headers={"Authorization": f"Bearer {key}"} if key else {})
