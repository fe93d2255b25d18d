"""Tiny random models of other kinds than the demo's policy, made from configurations, with the demo's tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TOKENIZER = Path(__file__).parents[2] / "headrace" / "demo" / "policy"
VOCABULARY = 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
GATED_DELTA_NETS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "full_attention_interval": 3,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | GATED_DELTA_NETS | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": GATED_DELTA_NETS,
    "qwen3_5_moe_text": EXPERTS | GATED_DELTA_NETS | {"shared_expert_intermediate_size": 16},
    "mamba": {},
    "rwkv": {"attention_hidden_size": 32},
    "lfm2": {"full_attn_idxs": [1]},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def make_model(kind: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | KINDS.get(kind, {}) | settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def make_checkpoint(folder: Path, kind: str, **settings: Any) -> Path:
    """What `save_pretrained` writes, and the tokenizer."""
    make_model(kind, **settings).save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, folder)
    return folder
