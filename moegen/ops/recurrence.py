"""Long short-term memory: one call of torch's kernel for all time steps, and its state.

Weights are those of torch.nn.LSTM: weight_ih [4H, d] and weight_hh [4H, R] for the gates i, f, g
and o in that order, bias_ih and bias_hh [4H], and weight_hr [R, H], which projects the H units
of a step to R outputs; without it R is H.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from moegen.ops.op import op

# A compiler would unroll all time steps; so it leaves them to torch's kernel.
_all_steps: Any = torch.compiler.disable(torch.lstm)  # type: ignore[no-untyped-call]


def _products(
    x: Any, weight_ih: Any, weight_hh: Any, weight_hr: Any = None
) -> tuple[int, int, int]:
    """FLOPs of the products with the input, with the last output, and of the projection."""
    tokens = 2 * x.shape[0] * x.shape[1]
    projection = 0 if weight_hr is None else int(tokens * weight_hr.numel())
    return int(tokens * weight_ih.numel()), int(tokens * weight_hh.numel()), projection


def _flops(x: Any, *weights: Any, weight_hr: Any = None) -> int:
    return sum(_products(x, weights[0], weights[1], weight_hr))


def _step_flops(x: Any, hidden: Any, cell: Any, *rest: Any, **named: Any) -> int:
    return _flops(x, *rest, **named)


def _backward(x: Any, *weights: Any, weight_hr: Any = None) -> Fraction:
    """Two products for each, but none for the gradient of the zeros before the first step."""
    forward = sum(_products(x, weights[0], weights[1], weight_hr))
    return 2 - Fraction(2 * x.shape[0] * weights[1].numel(), forward)


def _shares(x: Any, *weights: Any, weight_hr: Any = None) -> dict[str, Fraction]:
    """What is for one gradient alone; those of states are needed for any."""
    products = _products(x, weights[0], weights[1], weight_hr)
    by_input, by_output, projected = (Fraction(p, sum(products)) for p in products)
    return {
        "x": by_input,
        "weight_ih": by_input,
        "weight_hh": by_output,
        "weight_hr": projected,
    }


def _kept(x: Any, *weights: Any, weight_hr: Any = None) -> int:
    """Bytes of four gates, the cell and its tanh, for each step; and of what is projected."""
    values = 6 if weight_hr is None else 7
    units = weights[1].shape[0] // 4
    return int(x.shape[0] * x.shape[1] * values * units * x.dtype.itemsize)


def _inside(x: Any, *weights: Any, weight_hr: Any = None) -> tuple[int, int]:
    """Bytes of what inputs give to all gates, and of the gates' gradients."""
    gates = int(x.shape[0] * x.shape[1] * weights[1].shape[0] * x.dtype.itemsize)
    return gates, gates


def _result(x: Any, *weights: Any, weight_hr: Any = None) -> Tensor:
    """A tensor of the result's shape."""
    made: Tensor = x.new_empty(x.shape[0], x.shape[1], weights[1].shape[1])
    return made


def _step_result(x: Any, hidden: Any, cell: Any, *rest: Any, **named: Any) -> Tensor:
    return _result(x, *rest, **named)


@op(
    flops=_flops,
    backward=_backward,
    shares=_shares,
    saves=("x", "weight_ih", "weight_hh", "weight_hr", "out"),
    extra=_kept,
    inside=_inside,
    result=_result,
    steps=lambda x, *_, **__: int(x.shape[1]),
)
def lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
) -> Tensor:
    """Outputs [B, S, R] of inputs x [B, S, d], from a state of zeros (Hochreiter 1997)."""
    batch, units = x.shape[0], weight_hh.shape[0] // 4
    hidden = x.new_zeros(1, batch, weight_hh.shape[1])
    cell = x.new_zeros(1, batch, units)
    parts = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    weights = [part for part in parts if part is not None]
    return _lstm(x, hidden, cell, weights, bias_ih is not None)[0]


@op(
    effect=True,
    flops=_step_flops,
    result=_step_result,
    steps=lambda x, *_, **__: int(x.shape[1]),
)
def lstm_step(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
) -> Tensor:
    """Outputs [B, T, R] of x [B, T, d] from a state, hidden [B, R] and cell [B, H].

    The state after the last step takes its place.
    """
    parts = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    weights = [part for part in parts if part is not None]
    before = hidden.unsqueeze(0), cell.unsqueeze(0)
    out, last, kept = _lstm(x, *before, weights, bias_ih is not None)
    hidden.copy_(last[0])
    cell.copy_(kept[0])
    return out


def _lstm(
    x: Tensor, hidden: Tensor, cell: Tensor, weights: list[Tensor], biases: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, and the state after the last step; one layer, one direction, batch first."""
    train = torch.is_grad_enabled()
    out, last, kept = _all_steps(
        x, (hidden, cell), weights, biases, 1, 0.0, train, False, batch_first=True
    )
    return out, last, kept
