"""Rotary position embeddings: frequencies, their published scalings, and the rotation itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moegen.ops.op import op


@op()
def rope_frequencies(dim: int, theta: float, factor: float = 1.0) -> Tensor:
    """Angles per position, [dim / 2]: theta^(-2i/dim), divided by `factor` (linear scaling)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / (theta**exponents) / factor


@op()
def yarn_frequencies(
    dim: int,
    theta: float,
    factor: float,
    original: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """YaRN (Peng et al. 2023): keep fast dimensions, interpolate slow ones, ramp between."""
    plain = rope_frequencies(dim, theta)

    def turns_to_dim(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turns_to_dim(beta_fast), turns_to_dim(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2).float() - low) / width).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp)


@op()
def llama3_frequencies(
    dim: int,
    theta: float,
    factor: float,
    original: int,
    low: float = 1.0,
    high: float = 4.0,
) -> Tensor:
    """Llama 3.1: interpolate wavelengths longer than original / low, smoothly below.

    Where high is low there is no band between, but a step (Llama 4).
    """
    plain = rope_frequencies(dim, theta)
    wavelength = 2 * math.pi / plain
    band = max(high - low, 1e-9)
    smooth = ((original / wavelength - low) / band).clamp(0, 1)
    return (1 - smooth) * plain / factor + smooth * plain


@op()
def dynamic_frequencies(
    length: Tensor, dim: int, theta: float, factor: float, original: int
) -> Tensor:
    """Dynamic NTK scaling: theta grows with the sequence once it is longer than `original`.

    length: a whole number as a tensor [], so that no value travels to the host.
    """
    longer = length.clamp(min=original).float()
    growth = factor * longer / original - (factor - 1)
    base = theta * growth ** (dim / (dim - 2))
    exponents = (
        torch.arange(0, dim, 2, dtype=torch.int64, device=length.device).float() / dim
    )
    return 1.0 / (base**exponents)


@op()
def longrope_frequencies(
    length: Tensor,
    dim: int,
    theta: float,
    original: int,
    short: tuple[float, ...],
    long: tuple[float, ...],
) -> Tensor:
    """LongRoPE (Ding et al. 2024): one factor a dimension, another set beyond `original`."""
    plain = rope_frequencies(dim, theta).to(length.device)
    factors = torch.tensor([short, long], device=length.device)
    return plain / torch.where(length > original, factors[1], factors[0])


@op(saves=("cos", "sin"))
def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + r/2) of x [..., S, r] by the angles of cos and sin [S, r/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@op(saves=("cos", "sin"))
def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of x [..., S, r] by the angles of cos and sin [S, r/2]."""
    first, second = torch.unflatten(x, -1, (-1, 2)).unbind(-1)
    return torch.stack(
        (first * cos - second * sin, second * cos + first * sin), -1
    ).flatten(-2)
