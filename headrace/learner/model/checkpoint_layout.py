"""The weights as the checkpoint has them: under the names and in the shapes that engines and `from_pretrained` expect.

Transformers changes some on loading: it stacks a layer's experts into one parameter, or renames. Published is what it
would save, by its own reverse mapping, a few parameters at a time. What the checkpoint has and the policy does not (a
vision tower, heads for speculation) is published as it is there. So each version has the checkpoint's tensors, all of
them and no others, which is checked when the model is loaded: an engine passes over names that it does not know.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from headrace.learner.model.host_snapshots import Weight

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Parameters that become tensors of the checkpoint together: mostly one that becomes itself."""

    parts: Sequence[str]
    made: Mapping[str, Tensor]
    """On the meta device."""
    is_itself: bool
    """But for its name."""


class Naming:
    """How a model's parameters and persistent buffers become a checkpoint's tensors; looks at no values."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._groups = _groups(model, _without_values(stored_tensors(model)))
        self.shapes = {name: tensor.shape for group in self._groups for name, tensor in group.made.items()}

    @property
    def names(self) -> dict[str, str]:
        """The checkpoint's, of each parameter that becomes a tensor as it is."""
        return {group.parts[0]: next(iter(group.made)) for group in self._groups if group.is_itself}

    def of(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """`weights`, by the model's names, as the checkpoint's: those of which all parts are there. Each is to be
        detached once, before they change."""
        named: dict[str, Weight] = {}
        for group in self._groups:
            if not weights.keys() >= set(group.parts):
                continue
            parts = {part: weights[part] for part in group.parts}
            if group.is_itself:
                named |= dict(zip(group.made, parts.values(), strict=True))
                continue
            making = _Making(self._model, parts)
            dtype = next(iter(parts.values())).dtype
            named |= {name: MadeWeight(name, like.shape, dtype, making) for name, like in group.made.items()}
        return named


class _Making:
    """The tensors that a group becomes: held from when the first is asked for until each has been."""

    def __init__(self, model: PreTrainedModel, parts: Mapping[str, Weight]) -> None:
        self._model, self._parts = model, parts
        self._ready: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        if name not in self._ready:
            self._ready = _revert(self._model, {part: weight.detach() for part, weight in self._parts.items()})
        return self._ready.pop(name)


@dataclass(frozen=True)
class MadeWeight:
    """A part of a parameter, or several of them."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    making: _Making

    def detach(self) -> Tensor:
        return self.making.take(self.name)


@dataclass(frozen=True)
class UnchangedWeight:
    """A tensor of a checkpoint; read from its file each time."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    file: Path

    def detach(self) -> Tensor:
        with safe_open(self.file, "pt") as opened:
            found: Tensor = opened.get_tensor(self.name)
        return found


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once: tied ones under their first name."""
    stored = model.state_dict().keys()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in stored}


def unchanged_weights(
    model: PreTrainedModel, naming: Naming, path: str, revision: str | None = None
) -> dict[str, UnchangedWeight]:
    """What the checkpoint at `path` has beside the policy's tensors.

    Raises `ValueError` if it has not each of the policy's, in its shape; nothing is checked without safetensors.
    """
    found = {tensor.name: tensor for tensor in checkpoint_tensors(path, revision)}
    if not found:
        return {}
    unknown = sorted(naming.shapes.keys() - found.keys())
    if unknown:
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"model {path!r}: its checkpoint has no {unknown[0]}{others}, under which the policy's weights would be "
            "published: engines would pass over them. Expected what save_pretrained of AutoModelForCausalLM writes: "
            "load the model so, save it, and name that folder"
        )
    for name, shape in naming.shapes.items():
        if found[name].shape != shape:
            raise ValueError(
                f"model {path!r}: {name} has shape {tuple(found[name].shape)} in its checkpoint and {tuple(shape)} in "
                "the policy; expected the same"
            )
    own = naming.shapes.keys() | _revert(model, _without_values(model.state_dict())).keys()  # tied ones stored again
    return {name: tensor for name, tensor in found.items() if name not in own}


def published_from(parameters: Mapping[str, Tensor], frame: Path, unchanged: Path) -> dict[str, Tensor]:
    """What would be published of `parameters`, without the learner: by the model's configuration in `frame` and what
    `Policy.save_unchanged` has written."""
    if not unchanged.is_file():  # of a learner of an earlier release
        return dict(parameters)
    with safe_open(unchanged, "pt") as opened:
        names = json.loads(opened.metadata()["names"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    tensors |= {names[name]: tensor for name, tensor in parameters.items() if name in names}
    if others := {name: tensor for name, tensor in parameters.items() if name not in names}:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(frame))
        tensors |= {name: weight.detach().contiguous() for name, weight in Naming(model).of(others).items()}
    return tensors


def checkpoint_tensors(path: str, revision: str | None = None) -> Iterator[UnchangedWeight]:
    """Of the safetensors files that `from_pretrained` reads. Raises `ValueError` on a dtype that no version carries."""
    for file in _checkpoint_files(path, revision):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    expected = ", ".join(_DTYPES)
                    raise ValueError(f"model {path!r}: {name} is {part.get_dtype()}; expected one of {expected}")
                yield UnchangedWeight(name, torch.Size(part.get_shape()), _DTYPES[part.get_dtype()], Path(file))


def _checkpoint_files(path: str, revision: str | None) -> list[str]:
    def find(name: str) -> str | None:
        found: str | None = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return found

    if single := find(SAFE_WEIGHTS_NAME):
        return [single]
    if index := find(SAFE_WEIGHTS_INDEX_NAME):
        return list(get_checkpoint_shard_files(path, index, revision=revision)[0])
    return []


def _groups(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> list[Group]:
    """As small as they can be; all as one where a conversion looks at more than it changes."""
    by_first: dict[str, list[str]] = {}
    for part, like in stored.items():
        by_first.setdefault(next(iter(_revert(model, {part: like}))), []).append(part)
    groups = [_group(model, {part: stored[part] for part in parts}) for parts in by_first.values()]
    whole = _group(model, stored)
    made = {name: tensor.shape for group in groups for name, tensor in group.made.items()}
    return groups if made == {name: tensor.shape for name, tensor in whole.made.items()} else [whole]


def _group(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> Group:
    made = _revert(model, stored)
    is_itself = len(made) == len(stored) == 1 and next(iter(made.values())) is next(iter(stored.values()))
    return Group(list(stored), made, is_itself)


def _revert(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = revert_weight_conversion(model, dict(stored))
    return made


def _without_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
