"""Loads the model from its checkpoint: the whole model on rank 0, a model without values on the other ranks.

The others get their rows when it is sharded (distributed/fsdp.py), so that a machine holds only one whole copy for any
number of ranks. Computation uses the weights' dtype, except on a CPU that emulates bfloat16: that computes in
float32, on weights whose values are bfloat16 values.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from headrace.common.config import ModelConfig
from headrace.common.models.context_length import load_model_config
from headrace.common.models.hub import from_pretrained_arguments
from headrace.learner.model.checkpoint_layout import CheckpointMapping, stored_tensors, unchanged_weights
from headrace.learner.model.pretrained_tensors import PretrainedTensor
from headrace.learner.model.self_check import can_share_prompts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model, with what sharing prompts and publishing need to know of it."""

    model: PreTrainedModel
    shares_prompts: bool
    mapping: CheckpointMapping
    unchanged: Mapping[str, PretrainedTensor]
    """The checkpoint's tensors that the policy does not have."""
    dtypes: Mapping[str, torch.dtype]
    """The dtypes that parameters and persistent buffers are published in."""


def load_pretrained(settings: ModelConfig, device: torch.device, compute: torch.dtype) -> LoadedModel:
    """Loads the model in evaluation mode on `device`, to be computed in `compute`. Raises `ValueError` if it cannot be
    loaded or trained."""
    disable_progress_bar()
    path, dtype = settings.location, DTYPES[settings.dtype]
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, **from_pretrained_arguments(settings)
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model {path!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    _check_deterministic(model, path)
    _check_tied(model, settings)
    mapping = CheckpointMapping(model)
    unchanged = unchanged_weights(model, mapping, path, settings.revision)
    dtypes = {name: tensor.dtype for name, tensor in stored_tensors(model).items()}
    model.eval().to(device)
    if compute != dtype:
        model.to(compute)
    return LoadedModel(model, can_share_prompts(model, path), mapping, unchanged, dtypes)


def load_empty(settings: ModelConfig, compute: torch.dtype) -> PreTrainedModel:
    """The same model in evaluation mode with uninitialised values, whose memory has not been touched yet."""
    config = AutoConfig.from_pretrained(settings.location, **from_pretrained_arguments(settings))
    trust = settings.trust_remote_code
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=compute, trust_remote_code=trust)
    model.to_empty(device="cpu").tie_weights()
    if forgotten := [name for name, module in model.named_modules() if any(_is_meta(v) for v in vars(module).values())]:
        raise ValueError(
            f"model {settings.path!r} cannot be trained on several ranks: {forgotten[0]} has a tensor that is no "
            "buffer; expected learner.num_ranks 1"
        )
    return model.eval()


def _is_meta(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _check_deterministic(model: PreTrainedModel, path: str) -> None:
    modules = (module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    attention: float = getattr(model.config, "attention_dropout", 0.0) or 0.0
    if attention > 0 or any(module.p > 0 for module in modules):
        raise ValueError(f"model {path} has dropout: proximal and policy log-probabilities would differ")
    if getattr(model.config, "final_logit_softcapping", None):
        raise ValueError(f"model {path} caps its logits, which the chunked log-probabilities do not")


def _check_tied(model: PreTrainedModel, settings: ModelConfig) -> None:
    """Transformers unties weights that a checkpoint stores twice with different values; engines tie them nevertheless
    if the configuration asks for it."""
    is_tied = load_model_config(settings).tie_word_embeddings
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if is_tied and head is not None and head.weight is not embedding.weight:
        raise ValueError(
            f"model {settings.path!r}: its configuration sets tie_word_embeddings, but its checkpoint has a head that "
            "differs from the embedding, which engines would ignore; expected a configuration without "
            "tie_word_embeddings, or a checkpoint without the head"
        )
