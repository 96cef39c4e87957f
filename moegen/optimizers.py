"""Optimizers as what they keep: bytes of gradients and state for each parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moegen.graph.component import Weight


@dataclass(frozen=True)
class Optimizer:
    """Bytes that training with an optimizer needs beside a parameter itself."""

    name: str
    state: Callable[[Weight], int]
    note: str
    gradient: Callable[[Weight], int] = lambda weight: weight.bytes
    gradient_note: str = "in the parameters' format"


def _master(weight: Weight) -> int:
    """An fp32 copy, where the parameter itself is smaller."""
    return 4 * weight.count if weight.dtype.itemsize < 4 else 0


def _adam(weight: Weight) -> int:
    """fp32 master copy and two fp32 moments (ZeRO, arXiv:1910.02054: 12 bytes a parameter)."""
    return _master(weight) + 8 * weight.count


def _muon(weight: Weight) -> int:
    """fp32 master copy and momentum for hidden matrices; Adam for all others."""
    hidden = weight.role not in ("embedding", "head", "norms", "router") and len(weight.shape) > 1
    return _master(weight) + 4 * weight.count if hidden else _adam(weight)


def _eight_bit(weight: Weight) -> int:
    """Two moments of one byte, with an fp32 scale for each block of 256 (Dettmers 2021)."""
    return 2 * weight.count + 2 * 4 * -(-weight.count // 256)


OPTIMIZERS = {
    o.name: o
    for o in (
        Optimizer("adamw-mixed", _adam, "fp32 moments, and an fp32 copy of smaller parameters"),
        Optimizer("adamw", lambda w: 2 * w.bytes, "moments in the parameters' format, as torch's"),
        Optimizer("adamw-8bit", _eight_bit, "moments of 8 bits with a scale for each 256"),
        Optimizer("muon", _muon, "fp32 momentum and copy; Adam for embedding, head, norms, router"),
        Optimizer("sgd", lambda w: w.bytes, "momentum in the parameters' format"),
    )
}
