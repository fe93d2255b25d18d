"""Samples replies with transformers, for the episodes of a task that are evaluated side by side."""

import asyncio
import json
import re
from typing import Any

import torch

TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class Sampler:
    """Answers chat requests as an engine would. It waits until every running episode has asked, and samples for all.

    Conversations are rendered anew at each turn, from decoded replies.
    """

    def __init__(self, model: Any, tokenizer: Any, *, greedy: bool, max_new_tokens: int) -> None:
        self.num_running = 0
        """Episodes that will ask again, or end."""
        self._model = model
        self._tokenizer = tokenizer
        self._generate = {"max_new_tokens": max_new_tokens} | (
            {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
        )
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[str]]] = []

    async def send(self, body: dict[str, Any]) -> dict[str, Any]:
        """The choice of a reply to the body of a chat request."""
        text: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append((body, text))
        self._sample_if_all_wait()
        return {"message": read_message(await text), "finish_reason": "stop"}

    def end_episode(self) -> None:
        self.num_running -= 1
        self._sample_if_all_wait()

    def _sample_if_all_wait(self) -> None:
        if not self._waiting or len(self._waiting) < self.num_running:
            return
        waiting, self._waiting = self._waiting, []
        for (_, future), text in zip(waiting, self._texts([body for body, _ in waiting]), strict=True):
            future.set_result(text)

    @torch.no_grad()
    def _texts(self, bodies: list[dict[str, Any]]) -> list[str]:
        prompts = [
            self._tokenizer.apply_chat_template(
                body["messages"], tools=body.get("tools"), add_generation_prompt=True, tokenize=False
            )
            for body in bodies
        ]
        inputs = self._tokenizer(prompts, padding=True, return_tensors="pt")
        tokens = self._model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **self._generate
        )
        texts: list[str] = self._tokenizer.batch_decode(
            tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
        return texts


def read_message(text: str) -> dict[str, Any]:
    """The message that a reply's text is, with its tool calls (Hermes' format) read."""
    try:
        functions = [json.loads(call) for call in TOOL_CALL.findall(text)]
        calls = [{"name": one["name"], "arguments": json.dumps(one["arguments"])} for one in functions]
    except (ValueError, KeyError, TypeError):
        calls = []
    if not calls:
        return {"role": "assistant", "content": text}
    tool_calls = [{"id": f"call-{place}", "type": "function", "function": call} for place, call in enumerate(calls)]
    return {"role": "assistant", "content": TOOL_CALL.sub("", text), "tool_calls": tool_calls}
