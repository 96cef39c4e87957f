"""Randomness of routers: drawn in training only."""

from __future__ import annotations

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
