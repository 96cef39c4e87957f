"""Importance and load of experts, and how unevenly they vary (Shazeer et al. 2017, V-MoE 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moegen.ops.op import op


@op(flops=lambda weights, experts, num_experts: 0, saves=("experts",))
def dense_gates(weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Weights [T, k] of experts [T, k] as gates of all experts [T, E], 0 for those not chosen."""
    gates = weights.new_zeros(weights.shape[0], num_experts)
    return gates.scatter(-1, experts, weights)


@op(extra=lambda values, valid: values.shape[0] * values.dtype.itemsize)
def sum_of_real(values: Tensor, valid: Tensor) -> Tensor:
    """The sum [E] of values [T, E] over real tokens."""
    return (values * valid.unsqueeze(-1).to(values.dtype)).sum(0)


@op(
    saves=("values",),
    extra=lambda values, unbiased=False: 4 * values.dtype.itemsize,
)
def cv_squared(values: Tensor, unbiased: bool = False) -> Tensor:
    """Variance over squared mean of values [...], over their number or, unbiased, one less."""
    values = values.flatten()
    if values.shape[0] < 2:
        return (values * 0).sum()
    mean = values.mean()
    variance = values.var(correction=1 if unbiased else 0)
    return variance / mean.square().clamp(min=torch.finfo(values.dtype).tiny)


def _kept_of_chances(
    clean: Tensor,
    noisy: Tensor,
    deviation: Tensor | float,
    k: int,
    excluding: bool,
    training: bool,
) -> int:
    """Bytes of an order, two numbers a logit, and one more and a mark where they are needed."""
    if not training or k >= clean.shape[-1]:
        return 0
    size = clean.dtype.itemsize
    learned = isinstance(deviation, Tensor)
    return clean.numel() * (8 + (3 if learned else 2) * size + (1 if excluding else 0))


@op(
    saves=lambda clean, noisy, deviation, k, excluding, training: (
        ("deviation",) if isinstance(deviation, Tensor) and training else ()
    ),
    extra=_kept_of_chances,
)
def top_k_probability(
    clean: Tensor,
    noisy: Tensor,
    deviation: Tensor | float,
    k: int,
    excluding: bool,
    training: bool,
) -> Tensor:
    """How likely each expert is among the k best if its noise alone were drawn again, [T, E].

    clean and noisy logits [T, E], the noise's deviation. excluding: against the k-th best of the
    other experts, as Shazeer et al. have it; else against the k-th best of all, as V-MoE has it.
    In evaluation there is no noise: 1 for the k best, 0 for the others.
    """
    num_experts = clean.shape[-1]
    best = torch.sort(noisy, dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(noisy).scatter(-1, best.indices[..., :k], 1.0)
    if not training:
        return chosen
    if k >= num_experts:
        return torch.ones_like(clean)
    threshold = best.values[..., k - 1 : k]
    if excluding:
        threshold = torch.where(chosen > 0, best.values[..., k : k + 1], threshold)
    z = (clean - threshold) / deviation
    # Of a forbidden expert both sides are minus infinity.
    return 0.5 * (1 + torch.erf(torch.nan_to_num(z / math.sqrt(2))))


@op(
    flops=lambda ends, rows, dtype: 0,
)
def one_hot_rows(ends: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The expert of each of N rows as [E, N] of ones and zeros; none after the last end."""
    row = torch.arange(rows, device=ends.device, dtype=ends.dtype)
    owner = torch.searchsorted(ends, row, right=True)
    experts = torch.arange(ends.shape[0], device=ends.device)
    return (owner == experts.unsqueeze(-1)).to(dtype)


@op(
    flops=lambda outer, inner, ends: 2 * ends.shape[0] * inner.numel(),
    backward=1.0,
    saves=("outer", "inner"),
    extra=lambda outer, inner, ends: (
        ends.shape[0] * inner.shape[0] * inner.dtype.itemsize
    ),
)
def nested_importance(outer: Tensor, inner: Tensor, ends: Tensor) -> Tensor:
    """Sums of products of gates, for experts inside experts: [N], [N, M] -> [E, M].

    Rows [N] are grouped by expert and end at ends [E].
    """
    owned = one_hot_rows(ends, inner.shape[0], inner.dtype)
    return owned @ (outer.unsqueeze(-1) * inner)


@op(
    flops=lambda load, chances, ends, valid: 2 * ends.shape[0] * chances.numel(),
    backward=1.0,
    saves=("load",),
    extra=lambda load, chances, ends, valid: (
        (ends.shape[0] * (chances.shape[0] + chances.shape[1] + 1) + chances.shape[0])
        * chances.dtype.itemsize
    ),
)
def nested_load(load: Tensor, chances: Tensor, ends: Tensor, valid: Tensor) -> Tensor:
    """Load of experts inside experts: outer load [E] times inner load over the rows of each.

    chances [N, M] of rows [N] that are real where valid [N]; the result is [E, M].
    """
    owned = one_hot_rows(ends, chances.shape[0], chances.dtype)
    real = valid.to(chances.dtype)
    inner = owned @ (chances * real.unsqueeze(-1))
    return load.unsqueeze(-1) * inner / (owned @ real).clamp(min=1).unsqueeze(-1)
