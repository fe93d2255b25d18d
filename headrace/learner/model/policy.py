"""The policy on its device: from a micro-batch to the log-probabilities of its trained tokens.

It supports any causal language model that transformers loads (loading.py, self_check.py). The forward pass computes
hidden states; logits are computed only from those that predict a trained token. The same code runs on CPU and CUDA.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from headrace.common.config import LearnerConfig, ModelConfig
from headrace.common.hardware.device import compute_dtype, resolve_device
from headrace.common.weights.files import MODEL_FILE
from headrace.learner.distributed.fsdp import shard
from headrace.learner.distributed.ranks import Ranks
from headrace.learner.model.checkpoint_layout import stored_tensors
from headrace.learner.model.host_snapshots import Weight
from headrace.learner.model.loading import DTYPES, LoadedModel, load_empty, load_pretrained
from headrace.learner.model.logprobs import TokenScores, score_tokens
from headrace.learner.model.packing import MicroBatch, Pass
from headrace.learner.model.shared_prefix import LayoutTensors, hidden_states, layout_tensors, use_shared_prompts


def pick_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that an engine would choose (headrace/common/hardware/device.py). Raises `ValueError` if that is CUDA
    and torch cannot use it."""
    device = resolve_device(wanted)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"learner.device is {wanted!r}, but torch sees no GPU: it is torch {torch.__version__} for CUDA "
            f"{torch.version.cuda}; expected that, with its driver, or learner.device: cpu"
        )
    return torch.device(device)


class TokenScorer(nn.Module):
    """The whole forward pass as one module, to be sharded: from token ids to log-probabilities and entropies."""

    def __init__(self, model: PreTrainedModel, chunk_tokens: int, shares_prompts: bool) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.shares_prompts = shares_prompts

    def forward(
        self, input_ids: Tensor, layout: LayoutTensors, positions: Tensor, targets: Tensor, temperature: Tensor
    ) -> TokenScores:
        hidden = hidden_states(self.model, input_ids, layout, is_shared=self.shares_prompts)
        weight = self.model.get_output_embeddings().weight
        return score_tokens(hidden[positions], weight, targets, temperature, self.chunk_tokens)


@dataclass(frozen=True)
class RoundedWeight:
    """A weight that is published in another dtype than it is computed in; that dtype represents its values exactly."""

    tensor: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def detach(self) -> Tensor:
        return self.tensor.detach().to(self.dtype)


class Policy:
    """A model with weights in `dtype` on `device`, without dropout. Raises `ValueError` if it cannot be loaded or
    served.

    On several ranks it is sharded, and all ranks must execute each computation together.
    """

    def __init__(
        self, model: ModelConfig, learner: LearnerConfig, ranks: Ranks | None = None, loaded: LoadedModel | None = None
    ) -> None:
        """`loaded`: on rank 0, the result of `load_model` if it was called before."""
        self.ranks = ranks or Ranks()
        self.device = rank_device(learner, self.ranks)
        self.dtype = DTYPES[model.dtype]
        self.compute_dtype = DTYPES[compute_dtype(model.dtype, self.device.type)]
        if self.ranks.rank == 0:
            self._loaded = loaded or load_model(model, learner, self.ranks)
            self.model, shares_prompts = self._loaded.model, self.ranks.broadcast_flag(self._loaded.shares_prompts)
        else:
            self.model, shares_prompts = (
                load_empty(model, self.compute_dtype),
                self.ranks.broadcast_flag(False),
            )
            if shares_prompts:
                use_shared_prompts(self.model)
        if learner.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()
        self.scorer = TokenScorer(self.model, learner.chunk_tokens(self.device.type), shares_prompts)
        self.sharded = {}
        """The sharded parameters by name; empty on a single rank."""
        if not self.ranks.is_alone:
            self.sharded = shard(self.model, self.scorer, self.ranks, self.device, self.dtype)

    @property
    def rounded_to(self) -> dict[str, torch.dtype]:
        """The published dtype of each parameter that is computed in another dtype, by name."""
        dtypes = self._loaded.dtypes if self.ranks.rank == 0 else {}
        return {
            name: dtypes.get(name, self.dtype)
            for name, parameter in self.model.named_parameters()
            if self.compute_dtype != self.dtype and parameter.dtype != dtypes.get(name, self.dtype)
        }

    def logprobs(self, micro_batch: MicroBatch) -> Tensor:
        """Log-probabilities `(N,)` of the trained tokens at their sampling temperature, float32."""
        return self.score(micro_batch).logprobs

    def score(self, micro_batch: MicroBatch) -> TokenScores:
        """The log-probabilities of `logprobs`, and the entropy of the distribution that each trained token is from."""
        scored = [self.score_pass(one) for one in micro_batch.passes]
        return scored[0] if len(scored) == 1 else TokenScores(*map(torch.cat, zip(*scored, strict=True)))

    def score_pass(self, one: Pass) -> TokenScores:
        scored: TokenScores = self.scorer(
            self.to_device(one.input_ids),
            layout_tensors(one.layout, self.device),
            self.to_device(one.positions),
            self.to_device(one.targets),
            self.to_device(one.temperature),
        )
        return scored

    def reshard(self) -> None:
        """Must be called after a pass without a gradient and before an update: otherwise the root's weights stay
        gathered on every rank until the next backward pass, and later passes would compute with outdated weights."""
        if isinstance(self.scorer, FSDPModule):
            self.scorer.reshard()

    def to_device(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def published_weights(self) -> Mapping[str, Weight]:
        """On rank 0: the weights to publish, which are the checkpoint's tensors under its names. They must be read
        before the next update; on several ranks each `detach` calls all of them."""
        stored = stored_tensors(self.model)
        own = {name: self._as_published(name, tensor) for name, tensor in stored.items()} | self.sharded
        return {**self._loaded.mapping.convert(own), **self._loaded.unchanged}

    def _as_published(self, name: str, tensor: Tensor) -> Weight:
        dtype = self._loaded.dtypes[name]
        return tensor if tensor.dtype == dtype else RoundedWeight(tensor, dtype)

    def save_config_and_tokenizer(self, folder: Path, tokenizer: Any) -> None:
        """Writes the same files as `save`, without the weights."""
        self.model.config.save_pretrained(folder)
        if self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def save_unchanged(self, file: Path) -> None:
        """Writes what an export needs beside a checkpoint's masters, as safetensors: the published tensors that no
        update changes, and the published name of each parameter that is at most renamed."""
        parameters = dict(self.model.named_parameters())
        stored = stored_tensors(self.model)
        buffers = {name: self._as_published(name, one) for name, one in stored.items() if name not in parameters}
        unchanged = {**self._loaded.mapping.convert(buffers), **self._loaded.unchanged}
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in unchanged.items()}
        save_file(tensors, file, metadata={"names": json.dumps(self._loaded.mapping.names)})

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Writes the policy in Hugging Face format: `AutoModelForCausalLM.from_pretrained(folder)` loads it."""
        self.save_config_and_tokenizer(folder, tokenizer)
        whole = {name: weight.detach().cpu().contiguous() for name, weight in self.published_weights().items()}
        save_file(whole, folder / MODEL_FILE, metadata={"format": "pt"})


def rank_device(learner: LearnerConfig, ranks: Ranks) -> torch.device:
    """This rank's device."""
    device = pick_device(learner.device)
    return torch.device("cuda", ranks.local_rank) if device.type == "cuda" and not ranks.is_alone else device


def load_model(model: ModelConfig, learner: LearnerConfig, ranks: Ranks) -> LoadedModel:
    """Loads the model, on rank 0. With other ranks it stays in host memory until it is sharded."""
    device = rank_device(learner, ranks)
    loaded = load_pretrained(
        model, device if ranks.is_alone else torch.device("cpu"), DTYPES[compute_dtype(model.dtype, device.type)]
    )
    dtypes = {str(loaded.dtypes[name]) for name, _ in loaded.model.named_parameters()}
    if not ranks.is_alone and len(dtypes) > 1:
        found = ", ".join(sorted(dtypes))
        raise ValueError(f"model {model.path!r} has weights in {found}; expected a single dtype on several ranks")
    return loaded
