"""AdamW on float32 masters: equal to torch's for float32 weights, exact for bfloat16 ones, and it resumes."""

import pytest
import torch
from torch import nn

from headrace.common.config import OptimizerConfig
from headrace.learner.training.optimizer import MasterAdamW, learning_rate

SETTINGS = OptimizerConfig(lr=1e-2, weight_decay=0.1, max_grad_norm=0.5)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def take_updates(net: nn.Module, optimizer: MasterAdamW, count: int, first: int = 0) -> None:
    for index in range(first, first + count):
        torch.manual_seed(index)
        net(torch.randn(16, 4).to(next(net.parameters()).dtype)).float().pow(2).mean().backward()
        optimizer.update(SETTINGS.lr)


def test_float32_weights_are_their_own_masters_and_move_as_torch_moves_them() -> None:
    ours, theirs = model(), model()
    take_updates(ours, MasterAdamW(ours, SETTINGS), 5)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=SETTINGS.lr, weight_decay=0.1)
    for index in range(5):
        torch.manual_seed(index)
        adamw.zero_grad()
        theirs(torch.randn(16, 4)).pow(2).mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        adamw.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_bfloat16_weights_are_rounded_masters() -> None:
    net = model(torch.bfloat16)
    optimizer = MasterAdamW(net, SETTINGS)
    before = {name: master.clone() for name, master in optimizer.masters.items()}
    take_updates(net, optimizer, 1)
    for name, parameter in net.named_parameters():
        master = optimizer.masters[name]
        assert master.dtype == torch.float32 and not torch.equal(master, before[name])
        assert torch.equal(parameter, master.bfloat16())


def test_gradients_of_micro_batches_add_up_in_float32() -> None:
    """256 + 1, 256 times: sums in bfloat16 would stay at 256."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = MasterAdamW(net, SETTINGS)
    net(torch.full((1, 1), 256.0, dtype=torch.bfloat16)).sum().backward()
    for _ in range(256):
        net(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    gradient = optimizer.masters["weight"].grad
    assert gradient is not None and gradient.item() == 512.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimizer_continues_bit_for_bit(dtype: torch.dtype) -> None:
    straight, stopped, resumed = model(dtype), model(dtype), model(dtype)
    take_updates(straight, MasterAdamW(straight, SETTINGS), 6)
    first = MasterAdamW(stopped, SETTINGS)
    take_updates(stopped, first, 3)
    second = MasterAdamW(resumed, SETTINGS)
    second.load_state_tensors({name: tensor.clone() for name, tensor in first.state_tensors().items()})
    take_updates(resumed, second, 3, first=3)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_resumed_fused_optimizer_has_all_of_its_state_on_the_weights_device() -> None:
    """`meta` stands for CUDA, where AdamW is fused and refuses a `step` on the CPU."""
    saved = model()
    first = MasterAdamW(saved, SETTINGS)
    take_updates(saved, first, 1)
    resumed = MasterAdamW(model().to("meta"), SETTINGS)
    (group,) = resumed.adamw.param_groups
    group["fused"] = True
    resumed.load_state_tensors(first.state_tensors())
    for master in resumed.masters.values():
        state = resumed.adamw.state[master]
        assert {name: (tensor.device.type, tensor.dtype) for name, tensor in state.items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq"), ("meta", torch.float32)
        )


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    net = model()
    optimizer = MasterAdamW(net, SETTINGS)
    before = [parameter.clone() for parameter in net.parameters()]
    net(torch.full((1, 4), float("nan"))).sum().backward()
    assert not torch.isfinite(torch.tensor(optimizer.update(1e-2)))
    for one, other in zip(net.parameters(), before, strict=True):
        assert torch.equal(one, other)
    take_updates(net, optimizer, 1)
    assert not torch.equal(next(net.parameters()), before[0])


def test_learning_rate_schedules() -> None:
    linear = OptimizerConfig(lr=1.0, lr_schedule="linear", lr_final_fraction=0.2, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, linear) for step in (0, 4, 9, 10, 55, 100)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.6, 0.2])
    assert learning_rate(99, 100, OptimizerConfig(lr=1.0)) == 1.0


def test_the_cosine_equals_torchs_and_ends_at_its_final_fraction() -> None:
    """After a warm-up of 5 steps, against torch.optim.lr_scheduler."""
    cosine = OptimizerConfig(lr=2.0, lr_schedule="cosine", lr_final_fraction=0.1, warmup_steps=5)
    rates = [learning_rate(step, 45, cosine) for step in range(46)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[25::20] == pytest.approx([1.1, 0.2])
    adam = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=40, eta_min=0.2)
    for rate in rates[5:]:
        assert rate == pytest.approx(schedule.get_last_lr()[0])
        adam.step()
        schedule.step()


def test_warm_up_in_steps_equals_warm_up_as_a_fraction() -> None:
    in_steps, in_share = OptimizerConfig(lr=1.0, warmup_steps=10), OptimizerConfig(lr=1.0, warmup_fraction=0.1)
    assert [learning_rate(step, 100, in_steps) for step in range(15)] == [
        learning_rate(step, 100, in_share) for step in range(15)
    ]
    with pytest.raises(ValueError, match=r"warmup_fraction 0\.1 and warmup_steps 10 are both given"):
        OptimizerConfig(warmup_fraction=0.1, warmup_steps=10)


def test_an_unused_weight_moves_as_with_a_gradient_of_zero() -> None:
    """An expert that no token has chosen: on several ranks its gradient is zero, on a single rank it is missing."""
    missing, zero = model(), model()
    for net, is_zero in ((missing, False), (zero, True)):
        optimizer = MasterAdamW(net, SETTINGS)
        take_updates(net, optimizer, 1)
        first, _, last = net.children()
        last(torch.ones(1, 8)).sum().backward()
        if is_zero:
            for parameter in first.parameters():
                parameter.grad = torch.zeros_like(parameter)
        optimizer.update(SETTINGS.lr)
    after_one = model()
    take_updates(after_one, MasterAdamW(after_one, SETTINGS), 1)
    for found, expected, before in zip(*(net.parameters() for net in (missing, zero, after_one)), strict=True):
        assert torch.equal(found, expected) and not torch.equal(found, before)
