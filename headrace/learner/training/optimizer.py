"""AdamW on float32 master weights: bfloat16 weights are rounded copies of the masters, float32 weights are the masters.

Where bfloat16 weights are computed in float32 (loading.py), the copies are float32 tensors of bfloat16 values.
Gradients are summed in float32 as each backward pass delivers them, so that micro-batches of a bfloat16 model add up
exactly. An update whose gradient is not finite is skipped, and the weights stay as they are. On several ranks the
masters are this rank's shards; clipping and skipping use the norm of all ranks' gradients.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headrace.common.config import OptimizerConfig
from headrace.learner.distributed.fsdp import local_part
from headrace.learner.distributed.ranks import Ranks


def learning_rate(step: int, num_steps: int, settings: OptimizerConfig) -> float:
    """The rate of the step after `step` completed ones: linear warm-up, then constant, linear or half a cosine."""
    num_warmup = settings.warmup_steps or round(settings.warmup_fraction * num_steps)
    if step < num_warmup:
        return settings.lr * (step + 1) / num_warmup
    if settings.lr_schedule == "constant":
        return settings.lr
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if settings.lr_schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return settings.lr * (1 - progress * (1 - settings.lr_final_fraction))


class MasterAdamW:
    """Owns the master weights and AdamW's moments of a model's parameters."""

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerConfig,
        ranks: Ranks | None = None,
        rounded_to: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """`rounded_to`: the dtype that a float32 parameter's values are rounded to, by name."""
        self.ranks = ranks or Ranks()
        self.rounded_to = rounded_to or {}
        self.parameters = dict(model.named_parameters())
        self.masters = {name: _master(one, name in self.rounded_to) for name, one in self.parameters.items()}
        self.max_grad_norm = settings.max_grad_norm
        self.adamw = torch.optim.AdamW(
            self.masters.values(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=all(master.is_cuda for master in self.masters.values()),
        )
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.register_post_accumulate_grad_hook(self._gradient_to(self.masters[name]))

    def _gradient_to(self, master: Tensor):  # type: ignore[no-untyped-def]
        def move(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = local_part(parameter.grad).float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

        return move

    def update(self, lr: float) -> float:
        """Clips the gradient, steps, rounds the weights; returns the norm before clipping (inf or nan: skipped)."""
        masters = list(self.masters.values())
        for master in masters:
            if master.grad is None and self.adamw.state.get(master):
                master.grad = torch.zeros_like(master)  # an expert that no token has used in this update
        gradients = [master.grad for master in masters if master.grad is not None]
        total_norm = self.ranks.total_norm(nn.utils.get_total_norm(gradients))
        nn.utils.clip_grads_with_norm_(masters, self.max_grad_norm, total_norm)
        norm = float(total_norm)
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self._round_masters()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _round_masters(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32 or name in self.rounded_to:
                local_part(parameter).copy_(self.masters[name].to(self.rounded_to.get(name, torch.float32)))

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters and moments by name, which is all that a resume needs."""
        tensors = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            tensors |= {f"{key}.{name}": value for key, value in self.adamw.state[master].items()}
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Raises `KeyError` if a parameter of the model is missing, `ValueError` if its shape differs."""
        state = {}
        for index, (name, master) in enumerate(self.masters.items()):
            found = tensors[f"master.{name}"]
            if found.shape != master.shape:
                raise ValueError(f"{name}: the checkpoint has {tuple(found.shape)}, the model {tuple(master.shape)}")
            master.copy_(found)
            if f"step.{name}" in tensors:
                moments = {key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
                state[index] = {key: moment.to(master.device, copy=True) for key, moment in moments.items()}
                state[index]["step"] = tensors[f"step.{name}"].clone()
        # torch puts `step` where its kernel wants it: a fused one, on the device
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})
        self._round_masters()


def _master(parameter: nn.Parameter, is_copy: bool) -> Tensor:
    if is_copy or parameter.dtype != torch.float32:
        return local_part(parameter.detach()).float().clone().requires_grad_()
    if isinstance(parameter, DTensor):
        return local_part(parameter.detach()).requires_grad_()
    return parameter
