"""The model from its checkpoint: whole on rank 0, which alone reads it, and without values on the others.

Those are given their rows when it is sharded (distributed/fsdp.py), so that a machine's memory holds the model once
whole, whatever the number of its ranks. Computed is in the weights' dtype, but on a CPU that multiplies bfloat16 by
emulation in float32: the weights then are float32 numbers that bfloat16 has.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from headrace.common.config import ModelConfig
from headrace.common.models.context_length import load_model_config
from headrace.common.models.hub import loading
from headrace.learner.model.checkpoint_layout import Naming, UnchangedWeight, stored_tensors, unchanged_weights
from headrace.learner.model.self_check import shares_prompts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Loaded:
    """A model that was read, and what is to be known of it."""

    model: PreTrainedModel
    shares_prompts: bool
    naming: Naming
    unchanged: Mapping[str, UnchangedWeight]
    """Of its checkpoint, what the policy does not have."""
    dtypes: Mapping[str, torch.dtype]
    """Of its parameters and persistent buffers, as they are published."""


def load(settings: ModelConfig, device: torch.device, compute: torch.dtype) -> Loaded:
    """In evaluation mode, on `device`. Raises `ValueError` if it cannot be loaded or trained."""
    disable_progress_bar()
    path, dtype = settings.location, DTYPES[settings.dtype]
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **loading(settings))
    except (OSError, ValueError) as error:
        raise ValueError(f"model {path!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    _check_deterministic(model, path)
    _check_tied(model, settings)
    naming = Naming(model)
    unchanged = unchanged_weights(model, naming, path, settings.revision)
    dtypes = {name: tensor.dtype for name, tensor in stored_tensors(model).items()}
    model.eval().to(device)
    if compute != dtype:
        model.to(compute)
    return Loaded(model, shares_prompts(model, path), naming, unchanged, dtypes)


def load_without_values(settings: ModelConfig, compute: torch.dtype) -> PreTrainedModel:
    """The same model, in evaluation mode, in memory of which no page has been touched."""
    config = AutoConfig.from_pretrained(settings.location, **loading(settings))
    trust = settings.trust_remote_code
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=compute, trust_remote_code=trust)
    model.to_empty(device="cpu").tie_weights()
    if forgotten := [name for name, module in model.named_modules() if any(_is_meta(v) for v in vars(module).values())]:
        raise ValueError(
            f"model {settings.path!r} cannot be given to several ranks: {forgotten[0]} keeps a tensor that is no "
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
    """Transformers unties what a checkpoint stores twice with other values; engines go by the configuration."""
    says = load_model_config(settings).tie_word_embeddings
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if says and head is not None and head.weight is not embedding.weight:
        raise ValueError(
            f"model {settings.path!r}: its configuration says tie_word_embeddings, but its checkpoint has a head that "
            "is not the embedding, which engines would pass over; expected one of the two to say otherwise"
        )
