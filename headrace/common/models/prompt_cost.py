"""The cost of computing a group's prompt once per completion, estimated from a model's configuration.

Whether the prompt can be computed once for all completions of a group is measured by the learner when it has loaded the
model (headrace/learner/model/self_check.py). A configuration shows only which layers are not attention. Imports no
torch.
"""

from typing import Any

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def non_attention_layers(model_config: Any) -> list[str]:
    """The kinds of layers that are not attention, in a configuration by `load_model_config`."""
    return sorted(set(getattr(model_config, "layer_types", None) or []) - ATTENTION)


def unshared_prompt_note(model_config: Any, group_size: int, prompt_tokens: int, groups_per_step: int) -> str:
    """A note on the cost; empty if all layers are attention. `prompt_tokens`: the length of a typical prompt."""
    kinds = non_attention_layers(model_config)
    if not kinds:
        return ""
    more = (group_size - 1) * prompt_tokens * groups_per_step
    return (
        f"a prompt is computed {group_size} times, once for each completion, since layers are {', '.join(kinds)}: "
        f"{more:,} tokens a step more than with attention alone, at prompts of {prompt_tokens:,} tokens"
    )
