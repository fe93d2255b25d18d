"""The policy on several ranks: FSDP2 shards every parameter by rows, in float32, and computes in the model's dtype.

The shards are the optimizer's masters. A forward pass gathers rounded copies of them, layer by layer. Gradients are
summed over ranks in float32, never averaged, because each rank's loss is already scaled to its share of the whole
batch; a weight that a rank has not used has a gradient of zero there. At first rank 0 has all values in host memory; it
sends each rank its rows. Weights are gathered for publishing tensor by tensor, so that no device ever holds the whole
model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from headrace.learner.distributed.rank_calls import GatherWeight
from headrace.learner.distributed.ranks import Ranks
from headrace.learner.distributed.state_files import rows_of


@dataclass(frozen=True)
class ShardedWeight:
    """A weight whose rows are on several ranks; `detach` gathers them on rank 0's device."""

    name: str
    parameter: DTensor
    dtype: torch.dtype
    ranks: Ranks

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    def detach(self) -> Tensor:
        """Gathers the weight; called on rank 0, which calls the others. Raises `RankLost`."""
        with self.ranks.call_others(GatherWeight(self.name)):
            return self.gather()

    def gather(self) -> Tensor:
        """The whole weight, rounded to `dtype`; every rank must call it."""
        rounded = self.parameter.detach().to(self.dtype)
        assert isinstance(rounded, DTensor)
        whole: Tensor = rounded.full_tensor()
        return whole


def shard(
    model: nn.Module, root: nn.Module, ranks: Ranks, device: torch.device, published: torch.dtype
) -> dict[str, ShardedWeight]:
    """Shards `model`, which has values on rank 0 only, layer by layer.

    `root` contains it and computes the whole forward pass. All parameters must have one dtype; `published` is the dtype
    that they are published in. Returns the parameters by name.
    """
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
                parameter.data = torch.empty(parameter.shape)  # untouched, so it takes no memory
        sharded: FSDPModule = fully_shard(part, mesh=mesh, mp_policy=rounding)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_reduce_scatter_unused_params(True)
        if ranks.rank > 0:
            shards = dict(part.named_parameters())
            for name in own:
                _receive_rows(shards[name], dtype, ranks)
    for buffer in model.buffers():
        ranks.broadcast_tensor(buffer)
    weights = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        weights[name] = ShardedWeight(name, parameter, published, ranks)
    return weights


def _send_rows(parameter: Tensor, ranks: Ranks) -> None:
    """Sends each other rank its rows of rank 0's `parameter`."""
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
    """This rank's rows of a sharded tensor, in the same memory; a tensor that is not sharded is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
