"""What torch's own functions cost and keep for backward, as far as elements use them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.attention import seen_pairs

# A key is a function, or the name of a tensor method.
Key = Any


def _linear(out: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * x.numel() * weight.shape[0])


def _conv(out: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * out.numel() * weight[0].numel())


def _matmul(out: Any, a: Any, b: Any) -> int:
    return int(2 * out.numel() * a.shape[-1])


def _sdpa(
    out: Any, q: Any, k: Any, v: Any, *_: Any, is_causal: bool = False, **__: Any
) -> int:
    """Pairs that the mask lets through if it is causal, all pairs if it is a tensor."""
    pairs = seen_pairs(q.shape[2]) if is_causal else q.shape[2] * k.shape[2]
    return int(2 * q.shape[0] * q.shape[1] * pairs * (q.shape[-1] + v.shape[-1]))


FLOPS: dict[Key, Callable[..., int]] = {
    F.linear: _linear,
    F.conv2d: _conv,
    operator.matmul: _matmul,
    torch.matmul: _matmul,
    torch.bmm: _matmul,
    F.scaled_dot_product_attention: _sdpa,
}


def _five_products(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Fraction:
    """Flash attention computes the scores again (Dao 2023): three products as wide as q, two as v.

    2.5 where q and v are equally wide.
    """
    return Fraction(3 * q.shape[-1] + 2 * v.shape[-1], q.shape[-1] + v.shape[-1])


# FLOPs of the backward pass over those of the forward pass, from the arguments; 2 unless said.
BACKWARD: dict[Key, Callable[..., Fraction]] = {
    F.scaled_dot_product_attention: _five_products
}

# What backward keeps: numbers are arguments, "out" is the result. A product keeps each factor
# whose partner needs a gradient, which is "factors"; a quotient keeps its divisor besides.
_INPUT, _OUT, _FACTORS = (0,), ("out",), ("factors",)
SAVES: dict[Key, tuple[int | str, ...]] = {
    F.linear: ("factors",),
    F.conv2d: (0, 1),  # both, whichever gradient is needed
    operator.matmul: _FACTORS,
    torch.matmul: _FACTORS,
    torch.bmm: _FACTORS,
    operator.mul: _FACTORS,
    operator.truediv: ("factors", 1),
    operator.pow: _INPUT,
    F.scaled_dot_product_attention: (0, 1, 2, "out", "attn_mask"),
    F.rms_norm: (0, 2, "weight"),
    F.layer_norm: (0, 2, 3, "weight", "bias"),
    F.embedding: _INPUT,
    F.silu: _INPUT,
    F.gelu: _INPUT,
    F.relu: _OUT,
    F.softplus: _INPUT,
    torch.sigmoid: _OUT,
    torch.tanh: _OUT,
    torch.logsumexp: (0, "out"),
    "sigmoid": _OUT,
    "tanh": _OUT,
    "softmax": _OUT,
    "log_softmax": _OUT,
    "square": _INPUT,
    "clamp": _INPUT,
    "exp": _OUT,
    "masked_fill": (1,),
    "gather": (0, 2),  # the input too, for its shape
    "scatter": (2,),
    "amax": (0, "out"),
    operator.getitem: (1,),
}


def _rows(x: Tensor, norm: Any, *_: Any, **__: Any) -> int:
    """One statistic a normalised row, in fp32 or wider."""
    return int(max(4, x.dtype.itemsize) * x.numel() // norm[-1])


def _lse(q: Any, *_: Any, **__: Any) -> int:
    return int(max(4, q.dtype.itemsize) * q.shape[0] * q.shape[1] * q.shape[2])


def _kept(x: Any, p: float = 0.0, *_: Any, **__: Any) -> int:
    """Dropout's mask, one byte a value."""
    return int(x.numel()) if p else 0


def _indices(x: Any, k: int, dim: int = -1, *_: Any, **__: Any) -> int:
    """Places of the largest values, int64."""
    return int(8 * x.numel() // x.shape[dim] * k)


EXTRA: dict[Key, Callable[..., int]] = {
    F.rms_norm: _rows,
    F.layer_norm: lambda x, norm, *_, **__: 2 * _rows(x, norm),
    F.scaled_dot_product_attention: _lse,
    F.dropout: _kept,
    "topk": _indices,
}
