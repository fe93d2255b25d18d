"""What a model costs whose prompts are not shared, told from its configuration before it is loaded; imports no torch.

The learner finds out by computing whether a group's prompt can be computed once for all its completions
(headrace/learner/model/self_check.py), and says so in its log. A configuration says less: which layers are no
attention.
"""

from typing import Any

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def non_attention_layers(model_config: Any) -> list[str]:
    """Kinds of layers, of a configuration by `load_model_config`, that look at other tokens by other ways."""
    return sorted(set(getattr(model_config, "layer_types", None) or []) - ATTENTION)


def unshared_prompt_note(model_config: Any, group_size: int, prompt_tokens: int, groups_per_step: int) -> str:
    """A line for people, or "" where nothing speaks against sharing. `prompt_tokens` of a typical prompt."""
    kinds = non_attention_layers(model_config)
    if not kinds:
        return ""
    more = (group_size - 1) * prompt_tokens * groups_per_step
    return (
        f"a prompt is computed {group_size} times, once for each completion, since layers are {', '.join(kinds)}: "
        f"{more:,} tokens a step more than with attention alone, at prompts of {prompt_tokens:,} tokens"
    )
