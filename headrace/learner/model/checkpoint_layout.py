"""Converts parameters to the names and shapes of the model's checkpoint, which engines and `from_pretrained` expect.

Transformers converts some tensors on loading: it renames them or stacks a layer's experts into one parameter. Its own
reverse mapping converts them back for publishing, a few parameters at a time. Tensors that the checkpoint has and the
policy has not (a vision tower, heads for speculative decoding) are published unchanged. So each version has exactly the
checkpoint's tensors. This is checked when the model is loaded, because an engine ignores names that it does not know.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from headrace.learner.model.host_snapshots import Weight
from headrace.learner.model.pretrained_tensors import PretrainedTensor, pretrained_tensors


@dataclass(frozen=True)
class TensorGroup:
    """Parameters that are converted together to tensors of the checkpoint; mostly a single one, only renamed."""

    inputs: Sequence[str]
    outputs: Mapping[str, Tensor]
    """The checkpoint's tensors, on the meta device."""
    is_rename: bool
    """The conversion changes at most the name."""


class CheckpointMapping:
    """How a model's parameters and persistent buffers map to the checkpoint's tensors; computed without values."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._groups = _groups(model, _without_values(stored_tensors(model)))
        self.shapes = {name: tensor.shape for group in self._groups for name, tensor in group.outputs.items()}
        """The shapes of the checkpoint's tensors, by their names."""

    @property
    def names(self) -> dict[str, str]:
        """The checkpoint's name of each parameter that is at most renamed."""
        return {group.inputs[0]: next(iter(group.outputs)) for group in self._groups if group.is_rename}

    def convert(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """Converts `weights`, by the model's names, to the checkpoint's tensors; skips groups with a missing input.
        Each result must be detached once, before the weights change."""
        converted: dict[str, Weight] = {}
        for group in self._groups:
            if not weights.keys() >= set(group.inputs):
                continue
            inputs = {name: weights[name] for name in group.inputs}
            if group.is_rename:
                converted |= dict(zip(group.outputs, inputs.values(), strict=True))
                continue
            conversion = _Conversion(self._model, inputs)
            dtype = next(iter(inputs.values())).dtype
            converted |= {
                name: ConvertedWeight(name, like.shape, dtype, conversion) for name, like in group.outputs.items()
            }
        return converted


class _Conversion:
    """Converts a group when its first output is taken, and holds each output until it is taken."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Weight]) -> None:
        self._model, self._inputs = model, inputs
        self._outputs: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        if name not in self._outputs:
            self._outputs = _revert(self._model, {key: weight.detach() for key, weight in self._inputs.items()})
        return self._outputs.pop(name)


@dataclass(frozen=True)
class ConvertedWeight:
    """An output of a conversion: a part of one parameter, or made of several."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    conversion: _Conversion

    def detach(self) -> Tensor:
        return self.conversion.take(self.name)


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; tied ones appear once, under their first name."""
    stored = model.state_dict().keys()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in stored}


def unchanged_weights(
    model: PreTrainedModel, mapping: CheckpointMapping, path: str, revision: str | None = None
) -> dict[str, PretrainedTensor]:
    """The tensors of the checkpoint at `path` that the policy does not have.

    Raises `ValueError` if the checkpoint lacks one of the policy's tensors or has it in another shape. A checkpoint
    without safetensors files is not checked.
    """
    found = {tensor.name: tensor for tensor in pretrained_tensors(path, revision)}
    if not found:
        return {}
    unknown = sorted(mapping.shapes.keys() - found.keys())
    if unknown:
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"model {path!r}: its checkpoint has no tensor {unknown[0]}{others}, so engines would ignore the weights "
            "published under these names. Expected a checkpoint that AutoModelForCausalLM.save_pretrained has written: "
            "load the model with that class, save it, and set the path to that folder"
        )
    for name, shape in mapping.shapes.items():
        if found[name].shape != shape:
            raise ValueError(
                f"model {path!r}: {name} has shape {tuple(found[name].shape)} in its checkpoint and {tuple(shape)} in "
                "the policy; expected the same"
            )
    own = mapping.shapes.keys() | _revert(model, _without_values(model.state_dict())).keys()  # or tied twins
    return {name: tensor for name, tensor in found.items() if name not in own}


def published_tensors(parameters: Mapping[str, Tensor], config_folder: Path, unchanged: Path) -> dict[str, Tensor]:
    """The tensors that a learner would publish for `parameters`, from the model's configuration in `config_folder` and
    the file `unchanged` that `Policy.save_unchanged` has written."""
    if not unchanged.is_file():  # the run's learner was of an earlier release
        return dict(parameters)
    with safe_open(unchanged, "pt") as opened:
        names = json.loads(opened.metadata()["names"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    tensors |= {names[name]: tensor for name, tensor in parameters.items() if name in names}
    if others := {name: tensor for name, tensor in parameters.items() if name not in names}:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_folder))
        converted = CheckpointMapping(model).convert(others)
        tensors |= {name: weight.detach().contiguous() for name, weight in converted.items()}
    return tensors


def _groups(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> list[TensorGroup]:
    """The smallest groups; a single group of all if a conversion depends on tensors outside its group."""
    by_first_output: dict[str, list[str]] = {}
    for name, like in stored.items():
        by_first_output.setdefault(next(iter(_revert(model, {name: like}))), []).append(name)
    groups = [_group(model, {name: stored[name] for name in names}) for names in by_first_output.values()]
    whole = _group(model, stored)
    shapes = {name: tensor.shape for group in groups for name, tensor in group.outputs.items()}
    return groups if shapes == {name: tensor.shape for name, tensor in whole.outputs.items()} else [whole]


def _group(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> TensorGroup:
    outputs = _revert(model, stored)
    is_rename = len(outputs) == len(stored) == 1 and next(iter(outputs.values())) is next(iter(stored.values()))
    return TensorGroup(list(stored), outputs, is_rename)


def _revert(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    reverted: dict[str, Tensor] = revert_weight_conversion(model, dict(stored))
    return reverted


def _without_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
