"""Activations between the products of a feed-forward network that torch has no function for.

Gated ones take two tensors of one shape.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.op import op


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


@op(elementwise=True, saves=("gate", "up"), extra=lambda gate, up: _bytes(gate))
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of any one shape (Shazeer 2020, arXiv:2002.05202)."""
    return F.silu(gate) * up


@op(
    elementwise=True,
    saves=("gate", "up"),
    extra=lambda gate, up, approximate="none": _bytes(gate),
)
def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up; approximate: none or tanh (Shazeer 2020)."""
    return F.gelu(gate, approximate=approximate) * up


@op(elementwise=True, saves=("up",), extra=lambda gate, up: _bytes(gate))
def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) * up (Shazeer 2020)."""
    return F.relu(gate) * up


@op(
    elementwise=True,
    saves=("gate", "up"),
    extra=lambda gate, up, limit, alpha: 4 * _bytes(gate),
)
def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    """(clip(up, -limit, limit) + 1) * g * sigmoid(alpha * g), g = min(gate, limit) (gpt-oss)."""
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


@op(elementwise=True, extra=_bytes)
def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(x).square()


@op(elementwise=True, saves=("x",))
def cubic(x: Tensor) -> Tensor:
    """x^3 (Chen et al. 2022, arXiv:2208.02813)."""
    return x**3


@op(elementwise=True)
def identity(x: Tensor) -> Tensor:
    """x itself: linear experts, as those of hierarchical mixtures."""
    return x
