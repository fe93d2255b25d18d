"""Grows a small Qwen3 to about 10 M parameters without changing its results.

So a policy can be trained while it is small. The added parts have no effect until training changes them: every new row
of a projection that writes to the residual stream is 0, so that the added width stays 0 and the added heads, neurons
and layers add nothing. Norms divide by the root mean square over the width, so their weights are scaled down to
compensate for the added zeros.
"""

from typing import Any

import torch
from torch import Tensor

GROWN = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6}
GROWN |= {"num_attention_heads": 12, "num_key_value_heads": 6}
"""Grouped like the demo's policy: two heads share a key."""
DEVIATION = 0.02
WRITES = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")
"""Parameters that write to the residual stream; the embedding is the output layer as well."""
READS_WIDTH = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")


def grown(model: Any) -> Any:
    """The larger model, deterministic; its logits equal the small model's up to float32 rounding."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = model.config.to_dict() | GROWN | {"initializer_range": DEVIATION, "layer_types": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        larger = Qwen3ForCausalLM(Qwen3Config(**config))
    small, scale = model.state_dict(), (model.config.hidden_size / GROWN["hidden_size"]) ** 0.5
    with torch.no_grad():
        for name, tensor in larger.state_dict().items():
            if name.endswith(WRITES):
                tensor.zero_()
            if name in small:
                part = small[name] * scale if name.endswith(READS_WIDTH) else small[name]
                _corner(tensor, part).copy_(part)
    larger.generation_config = model.generation_config
    return larger


def _corner(tensor: Tensor, part: Tensor) -> Tensor:
    """The view of `tensor` that has the shape of `part`."""
    return tensor[tuple(slice(length) for length in part.shape)]
