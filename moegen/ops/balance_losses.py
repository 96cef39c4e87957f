"""Balance losses beyond that of all tokens: of groups, devices, second choices, and of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moegen.ops.losses import masked_mean
from moegen.ops.op import op
from moegen.ops.sequences import in_groups


def _kept_of_groups(
    scores: Tensor, experts: Tensor, valid: Tensor, group: int, divide: bool
) -> int:
    """Bytes of marks, and of lengths and fractions of groups."""
    groups = -(-scores.shape[0] // max(group, 1))
    size = scores.dtype.itemsize
    return (groups * group + groups * (1 + scores.shape[1])) * size + 8


@op(extra=_kept_of_groups)
def grouped_balance_loss(
    scores: Tensor, experts: Tensor, valid: Tensor, group: int, divide: bool
) -> Tensor:
    """E * sum of f_e P_e inside each group of so many tokens in a row, averaged over groups.

    scores [T, E], experts [T, k] (E: refused), valid [T]; f counts all k choices, divided by k if
    asked.
    """
    num_experts, k = scores.shape[1], experts.shape[1]
    real = in_groups(valid.to(scores.dtype), group).unsqueeze(-1)
    some = real.sum(1).clamp(min=1)
    probability = (in_groups(scores, group) * real).sum(1) / some
    chosen = scores.new_zeros(scores.shape[0], num_experts + 1)
    chosen = chosen.scatter(-1, experts, 1.0)[:, :num_experts]
    fraction = (in_groups(chosen, group) * real).sum(1) / some / (k if divide else 1)
    filled = (real.sum((1, 2)) > 0).sum().clamp(min=1)
    return num_experts * (fraction * probability).sum() / filled


def _kept_of_probability(scores: Tensor, valid: Tensor, group: int) -> int:
    """Bytes of a mark a token and of a length a group."""
    groups = -(-scores.shape[0] // max(group, 1))
    return (groups * group + groups) * scores.dtype.itemsize


@op(extra=_kept_of_probability)
def group_probability(scores: Tensor, valid: Tensor, group: int) -> Tensor:
    """Mean [G, E] of scores [T, E] over the real tokens of each group of so many in a row."""
    real = in_groups(valid.to(scores.dtype), group).unsqueeze(-1)
    return (in_groups(scores, group) * real).sum(1) / real.sum(1).clamp(min=1)


@op()
def group_shares(
    experts: Tensor, num_experts: int, valid: Tensor, group: int
) -> Tensor:
    """Choices [G, E] of each expert by a real token of each group, experts [T, k] -> they sum to k.

    A group without real tokens has none.
    """
    chosen = torch.zeros(experts.shape[0], num_experts, device=experts.device)
    chosen = chosen.scatter(-1, experts, 1.0)
    real = in_groups(valid.float(), group).unsqueeze(-1)
    return (in_groups(chosen, group) * real).sum(1) / real.sum(1).clamp(min=1)


def _kept_of_pool(routing: Sequence[Any], divide: int) -> int:
    """Bytes of shares averaged over layers, and of the number of groups."""
    return int(4 * routing[0].shares.numel() + 8)


@op(extra=_kept_of_pool)
def pooled_group_balance_loss(routing: Sequence[Any], divide: int) -> Tensor:
    """E * sum of f_e P_e inside each group, both averaged over layers first; mean over groups.

    f_e are shares over `divide`, so that transformers' Switch is met where groups are sequences.
    """
    fraction = torch.stack([r.shares for r in routing]).mean(0) / divide
    probability = torch.stack([r.probabilities for r in routing]).mean(0)
    filled = (fraction.sum(-1) > 0).sum().clamp(min=1)
    return fraction.shape[-1] * (fraction * probability).sum() / filled


@op(
    extra=lambda scores, experts, valid: (
        (scores.numel() + 3 * scores.shape[0] + 1) * scores.dtype.itemsize
    ),
)
def second_probability(scores: Tensor, experts: Tensor, valid: Tensor) -> Tensor:
    """Mean [E] of scores [T, E] that first choices experts [:, 0] leave, brought to sum to one."""
    rest = scores.scatter(-1, experts[:, :1], 0)
    rest = rest / rest.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return masked_mean(rest, valid)


@op()
def communication_fractions(
    experts: Tensor, size: int, devices: int, limit: int, valid: Tensor
) -> Tensor:
    """devices / limit * share of real tokens sent to each device: experts [T, k] -> [D].

    A device holds `size` experts; a token is sent to it once, however many of them it chose.
    """
    sent = torch.zeros(experts.shape[0], devices, device=experts.device)
    sent = sent.scatter(-1, experts // size, 1.0)
    return masked_mean(sent, valid) * (devices / limit)


def _kept_of_tokens(scores: Tensor, valid: Tensor, group: int | None) -> int:
    """Bytes of a mean and a mark a token, and of numbers of tokens."""
    size = scores.shape[0] if group is None else max(group, 1)
    groups = -(-scores.shape[0] // max(size, 1))
    return (2 * groups * size + 2 * groups + 1) * scores.dtype.itemsize


@op(extra=_kept_of_tokens)
def token_balance_loss(scores: Tensor, valid: Tensor, group: int | None) -> Tensor:
    """n * sum_t a_t^2 with a_t the mean over experts of scores [T, E] and n real tokens.

    Scores are softmaxes over the tokens of a group, so that it is 1 where all tokens are wanted
    alike; averaged over groups.
    """
    size = scores.shape[0] if group is None else group
    real = in_groups(valid.to(scores.dtype), size)
    wanted = in_groups(scores.mean(-1), size)
    per_group = (wanted.square() * real).sum(1) * real.sum(1)
    return per_group.sum() / (real.sum(1) > 0).sum().clamp(min=1)
