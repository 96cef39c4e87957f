"""Randomness of routers: drawn in training only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moegen.ops.op import op


@op(
    effect=True,
    extra=lambda x, eps, training: x.numel() * x.dtype.itemsize if training else 0,
)
def jitter(x: Tensor, eps: float, training: bool) -> Tensor:
    """x times U(1 - eps, 1 + eps), element by element, in training; x itself otherwise."""
    if not training:
        return x
    return x * torch.empty_like(x).uniform_(1 - eps, 1 + eps)


def _kept_noise(logits: Tensor, deviation: Any, training: bool) -> int:
    """Bytes of the noise, which the gradient of a learned deviation needs."""
    learned = isinstance(deviation, Tensor) and training
    return logits.numel() * logits.dtype.itemsize if learned else 0


@op(effect=True, extra=_kept_noise)
def gaussian_noise(logits: Tensor, deviation: Tensor | float, training: bool) -> Tensor:
    """logits [T, E] plus normal noise of a deviation, one or [T, E], in training."""
    if not training:
        return logits
    return logits + torch.randn_like(logits) * deviation


@op(effect=True)
def uniform_noise(logits: Tensor, low: float, high: float, training: bool) -> Tensor:
    """logits [T, E] plus U(low, high) in training."""
    if not training:
        return logits
    return logits + torch.rand_like(logits) * (high - low) + low


@op(effect=True)
def gumbel_noise(logits: Tensor, training: bool) -> Tensor:
    """logits [T, E] plus Gumbel noise in training: the best one is then a sample of the softmax."""
    if not training:
        return logits
    # An exponential draw may round to 0, whose logarithm is not finite.
    tiny = torch.finfo(logits.dtype).tiny
    return logits - torch.empty_like(logits).exponential_().clamp(min=tiny).log()
