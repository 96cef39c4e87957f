"""How parameters start where `torch.nn.init` alone does not say it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moegen.ops.op import op


@op(effect=True)
def orthogonal_(weight: Tensor, gain: float = 1.0, parts: int = 1) -> None:
    """Start each matrix of a stack [..., out, in] orthogonal, times gain; drawn in fp32.

    parts: matrices that each [out, in] holds one below the other, as gate and up.
    """
    stack = torch.unflatten(weight[None], -2, (parts, -1)).flatten(0, -3)
    for matrix in stack:
        drawn = torch.empty(matrix.shape, dtype=torch.float32, device=weight.device)
        matrix.copy_(nn.init.orthogonal_(drawn, gain))
