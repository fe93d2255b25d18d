"""The policy on several ranks: FSDP2 shards every parameter by rows, in float32, and computes in the model's dtype.

The shards are the optimizer's masters; what a forward pass gathers, layer by layer, are rounded copies of them, as on
one rank. Gradients are summed over ranks in float32, never averaged: each rank's loss already has its share of the
whole batch. A weight is published tensor by tensor, so that no device ever holds the model whole.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from services.learner.calls import Gather
from services.learner.ranks import Ranks


@dataclass(frozen=True)
class ShardedWeight:
    """A weight whose rows lie on several ranks; `detach` brings them together on rank 0's device."""

    name: str
    parameter: DTensor
    dtype: torch.dtype
    ranks: Ranks

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    def detach(self) -> Tensor:
        """On rank 0, which tells the others. Raises `RankLost`."""
        with self.ranks.told(Gather(self.name)):
            return self.gather()

    def gather(self) -> Tensor:
        """On every rank at the same time."""
        rounded = self.parameter.detach().to(self.dtype)
        assert isinstance(rounded, DTensor)
        whole: Tensor = rounded.full_tensor()
        return whole


def shard(model: nn.Module, root: nn.Module, ranks: Ranks, device: torch.device) -> dict[str, ShardedWeight]:
    """Shards `model` layer by layer; `root` holds it and computes all of the forward pass. Raises `ValueError`."""
    (dtype, *others) = {parameter.dtype for parameter in model.parameters()}
    if others:
        raise ValueError(f"the model has weights in {dtype} and {others}: on several ranks expected one dtype")
    layer_names = getattr(model, "_no_split_modules", None) or []
    layers = [module for module in model.modules() if type(module).__name__ in layer_names]
    mesh = init_device_mesh(device.type, (ranks.count,))
    rounding = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*layers, root):
        for parameter in part.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
        sharded: FSDPModule = fully_shard(part, mesh=mesh, mp_policy=rounding)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    weights = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        weights[name] = ShardedWeight(name, parameter, dtype, ranks)
    return weights


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, in the same memory; of any other, the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
