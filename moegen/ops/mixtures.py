"""Mixtures that are whole models: densities of targets, losses, votes, and gates by totals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.op import op


def _kept_of_values(outputs: Tensor, target: Tensor, variance: float) -> int:
    """Bytes of a difference an output."""
    return outputs.numel() * torch.promote_types(outputs.dtype, target.dtype).itemsize


@op(extra=_kept_of_values)
def gaussian_log_density(outputs: Tensor, target: Tensor, variance: float) -> Tensor:
    """-|target - outputs|^2 / (2 variance): outputs [B, E, n], target [B, n] -> [B, E].

    What does not depend on the outputs is left out, as in Jacobs et al. 1991.
    """
    return (target.unsqueeze(1) - outputs).square().sum(-1) * (-0.5 / variance)


def _kept_of_bits(outputs: Tensor, target: Tensor) -> int:
    """Bytes of a sign and of a product an output."""
    return target.numel() * outputs.element_size() + outputs.nbytes


@op(extra=_kept_of_bits)
def bernoulli_log_density(outputs: Tensor, target: Tensor) -> Tensor:
    """ln P(target) of logits [B, E, 1] -> [B, E]; a target [B] is yes where it is above 0."""
    sign = torch.where(target > 0, 1.0, -1.0).to(outputs.dtype)
    return -F.softplus(-outputs.squeeze(-1) * sign.unsqueeze(-1))


@op(
    extra=lambda outputs, target: (
        outputs.nbytes + 8 * outputs.shape[0] * outputs.shape[1]
    )
)
def class_log_density(outputs: Tensor, target: Tensor) -> Tensor:
    """ln P(class): logits [B, E, C] and the class [B] of each example -> [B, E]."""
    each = target.view(-1, 1, 1).repeat(1, outputs.shape[1], 1)
    return outputs.log_softmax(-1).gather(-1, each).squeeze(-1)


@op(elementwise=True, saves=("gates",), extra=lambda gates: gates.nbytes)
def log_gates(gates: Tensor) -> Tensor:
    """ln of gates, bounded below where they are 0, so that gradients stay finite."""
    return gates.clamp(min=torch.finfo(gates.dtype).tiny).log()


@op(flops=lambda outputs: 0)
def vote(outputs: Tensor) -> Tensor:
    """The share of experts for each class: outputs [B, E, C] -> [B, C]; ties to the lowest."""
    best = outputs.argmax(-1)
    return F.one_hot(best, outputs.shape[-1]).to(outputs.dtype).mean(1)


@op(effect=True)
def draw_expert(gates: Tensor) -> Tensor:
    """One expert for each example, drawn with the gates' probabilities: [B, E] -> [B, 1]."""
    return torch.multinomial(gates.detach(), 1)


@op()
def take_expert(outputs: Tensor, expert: Tensor) -> Tensor:
    """The output of one expert for each example: [B, E, n] and [B, 1] -> [B, n]."""
    index = expert.unsqueeze(-1).expand(-1, 1, outputs.shape[-1])
    return outputs.gather(1, index).squeeze(1)


def _running_assignment(gates: Tensor, totals: Tensor, margin: Tensor) -> Tensor:
    """Which gates [B, E] are open, example by example; totals [E] of those used grow in place."""
    passed = torch.empty_like(gates, dtype=torch.bool)
    for row, gate in enumerate(gates):
        allowed = totals - totals.mean() <= margin
        used = gate.where(allowed, 0)
        totals += (used / used.sum()).to(totals.dtype)
        passed[row] = allowed
    return passed


def _running_fake(gates: Tensor, totals: Tensor, margin: Tensor) -> Tensor:
    return torch.empty_like(gates, dtype=torch.bool)


def _define_once(name: str, kernel: Callable[..., Tensor], fake: Any) -> Any:
    """A torch.library op that writes its totals; the first copy of this file defines it."""
    if not hasattr(torch.ops.moegen, name):
        made = torch.library.custom_op(
            f"moegen::{name}", kernel, mutates_args=("totals",)
        )
        made.register_fake(fake)
    return getattr(torch.ops.moegen, name)


_assigned = _define_once("running_assignment", _running_assignment, _running_fake)


def _kept_of_constraint(
    gates: Tensor, totals: Tensor, margin: Tensor, training: bool
) -> int:
    """Bytes of a mark and an open gate an expert, and of a sum an example."""
    if not training:
        return 0
    return gates.numel() + gates.nbytes + gates.shape[0] * gates.element_size()


@op(effect=True, extra=_kept_of_constraint)
def constrain_gates(
    gates: Tensor, totals: Tensor, margin: Tensor, training: bool
) -> Tensor:
    """Gates [B, E] with those of experts that are ahead put to 0, in training (Eigen et al. 2013).

    An expert is ahead of an example if its total [E] exceeds the mean by more than margin [1];
    the rest are brought to sum to one, and these are what totals count.
    """
    if not training:
        return gates
    held = gates * _assigned(gates.detach(), totals, margin)
    return held / held.sum(-1, keepdim=True)  # type: ignore[no-any-return]


@op()
def fixed_signs(count: int) -> Tensor:
    """+1 for the first half of the neurons and -1 for the others, [1, count] (Chen et al. 2022)."""
    signs = torch.ones(1, count)
    signs[:, (count + 1) // 2 :] = -1
    return signs


@op()
def number(value: float) -> Tensor:
    """A number, as a tensor [1]."""
    return torch.full((1,), value)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chances: Tensor, opened: Tensor) -> Tensor:
        return opened.to(chances.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@op(effect=True, flops=lambda chances, training: 0)
def open_gates(chances: Tensor, training: bool) -> Tensor:
    """1 where a gate is open and 0 elsewhere: by chance [B, E] in training, else above one half.

    The gradient is that of the chances themselves (Bengio et al. 2013).
    """
    limit = torch.rand_like(chances) if training else 0.5
    opened = chances > limit
    return _StraightThrough.apply(chances, opened)  # type: ignore[no-any-return, no-untyped-call]


def _kept_of_sparsity(chances: Tensor, target: float, variance: float) -> int:
    """Bytes of a distance an expert and an example."""
    return sum(chances.shape) * chances.element_size()


@op(
    saves=lambda chances, target, variance: ("chances",) if variance else (),
    extra=_kept_of_sparsity,
)
def sparsity(chances: Tensor, target: float, variance: float) -> Tensor:
    """Squared distances of mean chances [B, E] to a target, less a share of their variance."""
    by_expert, by_example = chances.mean(0) - target, chances.mean(1) - target
    value = by_expert.square().mean() + by_example.square().mean()
    if variance:
        value = value - variance * chances.var(0, correction=0).mean()
    return value


@op(flops=lambda experts, current, nowhere: 0)
def first_choices(experts: Tensor, current: Tensor, nowhere: int) -> Tensor:
    """The first current [1] choices of experts [B, k], `nowhere` in place of the others."""
    ranks = torch.arange(experts.shape[-1], device=experts.device)
    return experts.masked_fill(ranks >= current, nowhere)


@op(flops=lambda start, k, steps: 0)
def annealing_plan(start: int, k: int, steps: int) -> Tensor:
    """From how many experts to how many, and in how many steps: [3]."""
    return torch.tensor([start, k, steps], dtype=torch.float32)


@op(flops=lambda weights: 0)
def chosen_by_any(weights: Tensor) -> Tensor:
    """Experts with a weight of any task: [B, T, E] -> numbers [B, E], E in place of the others."""
    experts = weights.shape[-1]
    every = torch.arange(experts, device=weights.device)
    return torch.where((weights != 0).any(1), every, experts)


@op(flops=lambda rows, order: 0, extra=lambda rows, order: order.nbytes)
def ungroup_rows(rows: Tensor, order: Tensor) -> Tensor:
    """Rows [N, n] back in the order of the flattened choices that they were made for."""
    back = torch.empty_like(order)
    places = torch.arange(order.shape[0], device=order.device)
    return rows.index_select(0, back.scatter_(0, order, places))
