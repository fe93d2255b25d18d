"""The settings of the model, the task and sampling."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

import headrace
from headrace.common.config.section import Section
from headrace.common.wire.structs import MAX_STOP_CHARS, MAX_STOPS

DType = Literal["float32", "bfloat16"]


class ModelConfig(Section):
    path: str = Field(
        description="Initial policy: a folder in Hugging Face format, or a hub name. `headrace/demo/policy` is "
        "the demo's policy; `guessing-policy` and `calculator-policy` beside it are those of these tasks. They come "
        "with the package."
    )
    revision: str | None = Field(
        None, min_length=1, description="Branch, tag or commit of a model on the hub; default: the newest."
    )
    trust_remote_code: bool = Field(
        False,
        description="Permission to run Python code from the model's repository, with your rights, in the learner, the "
        "engines and `headrace check`. Needed if transformers or SGLang lack the architecture; set revision to a "
        "commit.",
    )
    dtype: DType = Field(
        "bfloat16", description="Data type of the published weights and of the learner's forward pass."
    )
    chat_template: str | None = Field(
        None,
        description="File with a Jinja chat template, also saved with the policy; default: the model's template.",
    )
    chat_template_settings: dict[str, Any] = Field(
        {}, description="Variables of the chat template, such as enable_thinking: false for Qwen3."
    )

    @property
    def location(self) -> str:
        """`path` as this machine opens it; always open this, and store and report `path`.

        A path in the package, such as `headrace/demo/policy`, is the installed package's folder if the working
        directory has no such folder. It is resolved at each use, because a run's services may have the package in
        different folders.
        """
        packaged = Path(headrace.__file__).parents[1] / self.path
        is_packaged = self.path.startswith("headrace/") and not Path(self.path).exists() and packaged.is_dir()
        return str(packaged) if is_packaged else self.path


class TaskConfig(Section):
    name: str = Field(
        description="Name of a built-in task (arithmetic, calculator, gsm8k, guessing, judged, reasoning_gym), or "
        "'package.module:Class'."
    )
    settings: dict[str, Any] = Field({}, description="Keyword arguments of the task.")
    system_prompt: str | None = Field(
        None,
        min_length=1,
        description="System message before each of the task's prompts; default: none. Refused if the chat template "
        "takes none or the task has its own.",
    )


FULL_DISTRIBUTION = "the engine would sample from another distribution than the learner computes"
NOT_OFFERED = {
    **{f"sampling.{name}": FULL_DISTRIBUTION for name in ("top_p", "top_k", "min_p", "logit_bias")},
    **{f"sampling.{kind}_penalty": FULL_DISTRIBUTION for kind in ("repetition", "frequency", "presence")},
    "sampling.min_new_tokens": "it masks the end tokens, so that "
    + FULL_DISTRIBUTION
    + "; a reward can ask for length",
}
"""Settings that other libraries have and Headrace cannot have, with the reason."""


class SamplingConfig(Section):
    """The engine samples from the full distribution, which is also the learner's: top_p is 1, top_k is off, and no
    token is masked."""

    temperature: float = Field(
        1.0, ge=1e-3, le=1e3, description="Sampling temperature; the learner also divides its logits by it."
    )
    max_new_tokens: int = Field(1024, ge=1, description="Longest completion, in tokens.")
    stop: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]] = Field(
        [],
        max_length=MAX_STOPS,
        description="Texts that end a completion, in addition to the model's end tokens. The token that completes such "
        "a text is the last token of the completion, in training and for the reward.",
    )
