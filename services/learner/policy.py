"""The policy on its device: from a micro-batch to the log-probabilities of its trained tokens.

Any causal language model that transformers loads whose layers look at other tokens by its attention interface alone:
a group's prompt is computed once for its completions. The forward pass stops at the hidden states, and only those
that predict a trained token meet the vocabulary. The same code runs on CPU and CUDA.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from common.config import LearnerConfig, ModelConfig
from common.device import resolve_device
from common.hub import loading
from common.weights import MODEL_FILE
from services.learner.logprobs import Scored, score_tokens
from services.learner.packing import MicroBatch
from services.learner.prompt_sharing import Places, check_shares_prompts, places
from services.learner.ranks import Ranks
from services.learner.sharding import shard
from services.learner.snapshots import Weight

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """As an engine would choose (common/device.py). Raises `ValueError` if that is CUDA, and torch cannot use it."""
    device = resolve_device(wanted)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"learner.device is {wanted!r}, but torch sees no GPU: it is torch {torch.__version__} for CUDA "
            f"{torch.version.cuda}; expected that, with its driver, or learner.device: cpu"
        )
    return torch.device(device)


class TokenScorer(nn.Module):
    """All of the forward pass, so that it can be sharded as one: from token ids to log-probabilities and entropies."""

    def __init__(self, model: PreTrainedModel, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens

    def forward(
        self, input_ids: Tensor, places: Places, positions: Tensor, targets: Tensor, temperature: Tensor
    ) -> Scored:
        decoder = self.model.get_decoder()
        hidden = decoder(
            input_ids=input_ids, position_ids=places.positions, use_cache=False, places=places
        ).last_hidden_state
        weight = self.model.get_output_embeddings().weight
        return score_tokens(hidden.flatten(0, 1)[positions], weight, targets, temperature, self.chunk_tokens)


class Policy:
    """A model in `dtype` on `device`, dropout off. Raises `ValueError` if it cannot be loaded or served.

    On several ranks it is sharded, and whatever it computes is computed by all of them at the same time.
    """

    def __init__(self, model: ModelConfig, learner: LearnerConfig, ranks: Ranks | None = None) -> None:
        disable_progress_bar()
        self.ranks = ranks or Ranks()
        self.device = pick_device(learner.device)
        if self.device.type == "cuda" and not self.ranks.is_alone:
            self.device = torch.device("cuda", self.ranks.local_rank)
        self.dtype = DTYPES[model.dtype]
        self.model = self._load(model)
        if learner.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()
        if _has_dropout(self.model):
            raise ValueError(f"model {model.path} has dropout: proximal and policy log-probabilities would differ")
        if getattr(self.model.config, "final_logit_softcapping", None):
            raise ValueError(f"model {model.path} caps its logits, which the chunked log-probabilities do not")
        self.scorer = TokenScorer(self.model, learner.chunk_tokens(self.device.type))
        self.sharded = {} if self.ranks.is_alone else shard(self.model, self.scorer, self.ranks, self.device)
        """The weights by name; empty on one rank."""

    def _load(self, config: ModelConfig) -> PreTrainedModel:
        path = config.path
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype, **loading(config))
        except (OSError, ValueError) as error:
            raise ValueError(f"model {path!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        model.eval()
        if self.ranks.is_alone:
            model.to(self.device)  # else a shard of it goes there
        check_shares_prompts(model, path)
        return model

    def logprobs(self, micro_batch: MicroBatch) -> Tensor:
        """Log-probabilities `(N,)` of the trained tokens at their sampling temperature, float32."""
        return self.score(micro_batch).logprobs

    def score(self, micro_batch: MicroBatch) -> Scored:
        """As `logprobs`, with the entropy of the distribution that each trained token is from."""
        scored: Scored = self.scorer(
            self.to_device(micro_batch.input_ids),
            places(micro_batch.layout, self.device),
            self.to_device(micro_batch.positions),
            self.to_device(micro_batch.targets),
            self.to_device(micro_batch.temperature),
        )
        return scored

    def to_device(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def tensors(self) -> Mapping[str, Weight]:
        """What is published: every parameter once, tied ones under their first name."""
        if self.sharded:
            return self.sharded
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def save_frame(self, folder: Path, tokenizer: Any) -> None:
        """What `save` writes, but for the weights."""
        self.model.config.save_pretrained(folder)
        if self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def save(self, folder: Path, tokenizer: Any) -> None:
        """In Hugging Face format: `AutoModelForCausalLM.from_pretrained(folder)` loads it."""
        if self.sharded:
            self.save_frame(folder, tokenizer)
            whole = {name: weight.detach().cpu() for name, weight in self.sharded.items()}
            save_file(whole, folder / MODEL_FILE, metadata={"format": "pt"})
            return
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _has_dropout(model: PreTrainedModel) -> bool:
    modules = (module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    attention: float = getattr(model.config, "attention_dropout", 0.0) or 0.0
    return attention > 0 or any(module.p > 0 for module in modules)
