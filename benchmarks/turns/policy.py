"""A policy that never ends a reply by itself, and the tokens of its conversations."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from benchmarks.demo import ROOT
from benchmarks.tasks.talking import MESSAGE
from headrace.common.config import ModelConfig
from headrace.common.models.bridge import Bridge
from headrace.common.models.chat_template import ChatTemplate
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.wire import Limits, Message, Sampling, Ticket

POLICY = ROOT / "headrace" / "demo" / "guessing-policy"
CONTEXT_TOKENS = 4096
NUM_TURN_TOKENS = 64
OPENING: Message = {"role": "user", "content": "Tell me more."}


class Talk(NamedTuple):
    """What every conversation consists of, besides the replies."""

    prompt_tokens: list[int]
    bridge_tokens: list[int]
    """Between a reply that was cut off and the next."""


def write_policy(folder: Path) -> Path:
    """Random weights of the small policy's shapes, with a longer context.

    The first hidden unit is large after every token, and the end token's logit is lowered by it.
    """
    shutil.copytree(POLICY, folder)
    config = json.loads((POLICY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT_TOKENS}))
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, tensor in load_file(POLICY / "model.safetensors").items():
        noise = 0.08 * torch.randn(tensor.shape, generator=generator)
        weights[name] = torch.ones(tensor.shape) if tensor.ndim == 1 else noise
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0] = 3.0
    embedding[config["eos_token_id"], 0] = -3.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_bridge(policy: Path) -> Bridge:
    model = ModelConfig(path=str(policy), dtype="float32")
    chat = ChatTemplate(load_tokenizer(model), model)
    return Bridge(chat, {chat.tokenizer.eos_token_id})


def make_talk(bridge: Bridge) -> Talk:
    prompt, reply = bridge.chat.encode([OPENING]), {"role": "assistant", "content": "x"}
    return Talk(prompt, bridge.tokens(reply, prompt[-1], [MESSAGE]))


def make_ticket(talk: Talk, name: str, num_turns: int, num_episodes: int) -> Ticket:
    return Ticket(
        id=name,
        kind="train",
        prompt_tokens=talk.prompt_tokens,
        messages=[OPENING],
        reference={"turns": num_turns},
        num_completions=num_episodes,
        sampling=Sampling(1.0, NUM_TURN_TOKENS, []),
        min_weight_version=1,
        limits=Limits(num_turns, num_turns * NUM_TURN_TOKENS, CONTEXT_TOKENS, 1),
    )
