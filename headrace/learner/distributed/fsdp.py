"""The policy on several ranks: FSDP2 shards every parameter by rows, in float32, and computes in the model's dtype.

The shards are the optimizer's masters; what a forward pass gathers, layer by layer, are rounded copies of them, as on
one rank. Gradients are summed over ranks in float32, never averaged: each rank's loss already has its share of the
whole batch; a weight that a rank has not used has a gradient of zero there. Rank 0 has the values at first, whole, in
host memory, and sends each rank its rows. A weight is published tensor by tensor, so that no device ever holds the
model whole.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from headrace.learner.distributed.rank_calls import Gather
from headrace.learner.distributed.ranks import Ranks
from headrace.learner.distributed.state_files import rows_of


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


def shard(
    model: nn.Module, root: nn.Module, ranks: Ranks, device: torch.device, published: torch.dtype
) -> dict[str, ShardedWeight]:
    """Shards `model` layer by layer; it has values on rank 0 alone. `root` holds it and computes all of the forward
    pass. Returns the parameters, which are of one dtype, as they are published."""
    (dtype,) = {parameter.dtype for parameter in model.parameters()}
    layer_names = getattr(model, "_no_split_modules", None) or []
    layers = [module for module in model.modules() if type(module).__name__ in layer_names]
    mesh = init_device_mesh(device.type, (ranks.count,))
    rounding = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*layers, root):
        own = {name: one for name, one in part.named_parameters() if not isinstance(one, DTensor)}
        for parameter in own.values():
            if ranks.rank == 0:
                _send_rows(parameter, ranks)
                parameter.data = parameter.data.float()
            else:
                parameter.data = torch.empty(parameter.shape)  # of which no page is touched
        sharded: FSDPModule = fully_shard(part, mesh=mesh, mp_policy=rounding)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_reduce_scatter_unused_params(True)
        if ranks.rank > 0:
            shards = dict(part.named_parameters())
            for name in own:
                _receive_rows(shards[name], dtype, ranks)
    for buffer in model.buffers():
        ranks.share(buffer)
    weights = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        weights[name] = ShardedWeight(name, parameter, published, ranks)
    return weights


def _send_rows(parameter: Tensor, ranks: Ranks) -> None:
    """From rank 0 to each of the others."""
    for rank in range(1, ranks.count):
        rows = rows_of(len(parameter), rank, ranks.count)
        if rows:
            ranks.send(parameter.detach()[rows.start : rows.stop].cpu().contiguous(), rank)


@torch.no_grad()
def _receive_rows(parameter: Tensor, dtype: torch.dtype, ranks: Ranks) -> None:
    local = local_part(parameter)
    if len(local):
        local.copy_(ranks.receive(torch.empty(local.shape, dtype=dtype)))


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, in the same memory; of any other, the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
