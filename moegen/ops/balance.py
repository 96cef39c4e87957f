"""Balancing without a loss: the update of a router's bias."""

from __future__ import annotations

import torch
from torch import Tensor

from moegen.ops.op import op


@op(effect=True)
def move_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """bias += rate * sign(mean load - load), in place; load [E] counts the step's choices."""
    counts = load.to(bias.dtype)
    with torch.no_grad():
        return bias.add_((counts.mean() - counts).sign(), alpha=rate)
