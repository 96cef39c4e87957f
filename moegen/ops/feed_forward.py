"""A routed layer's experts in one op, whose backward pass keeps the tokens and one product.

Rows are those of experts.py: row i is flattened choice order[i], grouped by expert up to `ends`.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.experts import (
    _grouped_linear,
    _grouped_outer,
    _inverse,
    _starts,
    _sum_entries,
)
from moegen.ops.op import op


class _FeedForward(torch.autograd.Function):
    """Gathers rows, applies both products with the activation between, and sums rows by weight.

    Rows and activations are computed again in the backward pass, and nothing of the second
    product is kept: the gradient of a weight follows from the gradient of its row's activation.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        activation: Callable[[Tensor], Tensor],
        recompute: bool,
        tokens: Tensor,
        order: Tensor | None,
        weights: Tensor | None,
        ends: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        hidden = _project(_rows(tokens, order), up, up_bias, ends)
        out = _project(activation(hidden), down, down_bias, ends)
        ctx.activation = activation
        kept = None if recompute else hidden
        ctx.save_for_backward(
            tokens, order, weights, ends, up, down, up_bias, down_bias, kept
        )
        if order is None or weights is None:
            return out
        starts = _starts(order, tokens.shape[0])
        shares = weights.to(out.dtype).flatten()
        return _sum_entries(out, _inverse(order), starts, shares)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: D102
        tokens, order, weights, ends, up, down, up_bias, down_bias, hidden = (
            ctx.saved_tensors
        )
        wants = dict(zip(_INPUTS, ctx.needs_input_grad[2:], strict=True))
        rows = _rows(tokens, order)
        if hidden is None:
            hidden = _project(rows, up, up_bias, ends)
        grad = _rows(grad.contiguous(), order)
        active, pull = torch.func.vjp(ctx.activation, hidden)
        grad_active = _grouped_linear(grad, down.transpose(1, 2), ends)
        found: dict[str, Tensor] = {}
        share = None
        if order is not None and weights is not None:
            share = weights.to(grad.dtype).flatten().index_select(0, order)
            share = share.unsqueeze(-1)
            if wants["weights"]:
                of_row = (grad_active * active).sum(-1, dtype=torch.float32)
                if down_bias is not None:
                    of_row = of_row + _dot_bias(grad, down_bias, ends)
                found["weights"] = _by_choice(of_row, order, weights)
            grad_active = grad_active * share
            active = active * share
        if wants["down"]:
            found["down"] = _grouped_outer(grad, active, ends)
        if wants["down_bias"]:
            ones = grad.new_ones(grad.shape[0], 1) if share is None else share
            found["down_bias"] = _grouped_outer(grad, ones, ends).squeeze(-1)
        (grad_hidden,) = pull(grad_active)
        if wants["up"]:
            found["up"] = _grouped_outer(grad_hidden, rows, ends)
        if wants["up_bias"]:
            ones = grad.new_ones(grad.shape[0], 1)
            found["up_bias"] = _grouped_outer(grad_hidden, ones, ends).squeeze(-1)
        if wants["tokens"]:
            grad_rows = _grouped_linear(grad_hidden, up.transpose(1, 2), ends)
            found["tokens"] = _sum_tokens(grad_rows, order, tokens.shape[0])
        return None, None, *(found.get(name) for name in _INPUTS)


_INPUTS = (
    *("tokens", "order", "weights", "ends"),
    *("up", "down", "up_bias", "down_bias"),
)


def _rows(tokens: Tensor, order: Tensor | None) -> Tensor:
    """The token of every row, or the rows themselves where no order is given."""
    if order is None:
        return tokens
    k = order.shape[0] // max(tokens.shape[0], 1)
    return tokens.index_select(0, order // max(k, 1))


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    out: Tensor = _grouped_linear(rows, weight, ends)
    return out if bias is None else out + _of_rows(bias, out, ends)


def _of_rows(bias: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """The bias of each row's expert, [N, n]; zero for rows of no expert."""
    row = torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype)
    expert = torch.searchsorted(ends, row, right=True)
    return F.pad(bias, (0, 0, 0, 1)).index_select(0, expert)


def _dot_bias(grad: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    return (grad * _of_rows(bias, grad, ends)).sum(-1, dtype=torch.float32)


def _by_choice(of_row: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Values of rows [N] where their choices are, in the shape and format of weights [T, K]."""
    placed = torch.empty_like(of_row).scatter_(0, order, of_row)
    return placed.view(weights.shape).to(weights.dtype)


def _sum_tokens(rows: Tensor, order: Tensor | None, num_tokens: int) -> Tensor:
    if order is None:
        return rows
    return _sum_entries(rows, _inverse(order), _starts(order, num_tokens), None)


def _gated(
    activation: Callable[..., Tensor], gated: bool, settings: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """The activation of pre-activations [N, 2n], whose first half is the gate, or [N, n]."""

    def apply(hidden: Tensor) -> Tensor:
        halves = hidden.chunk(2, -1) if gated else (hidden,)
        return activation(*halves, **settings)

    return apply


def _run(
    tokens: Tensor,
    order: Tensor | None,
    weights: Tensor | None,
    ends: Tensor,
    parameters: tuple[Tensor | None, ...],
    activation: Callable[[Tensor], Tensor],
    recompute: bool,
) -> Tensor:
    """In the format of the parameters, or of autocast."""
    kind = tokens.device.type
    dtype = parameters[0].dtype if parameters[0] is not None else tokens.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    cast = (p if p is None else p.to(dtype) for p in parameters)
    return _FeedForward.apply(  # type: ignore[no-any-return]
        activation, recompute, tokens.to(dtype), order, weights, ends, *cast
    )


def _flops(rows: int, up: Tensor, down: Tensor) -> int:
    return int(2 * rows * (up.shape[1] * up.shape[2] + down.shape[1] * down.shape[2]))


def _backward(
    rows: int,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    recompute: bool,
) -> Fraction:
    """Two products for each, the sums for biases, and the first product once more."""
    more = 0 if up_bias is None else 2 * rows * up.shape[1]
    more += 0 if down_bias is None else 2 * rows * down.shape[1]
    more += 2 * rows * up.shape[1] * up.shape[2] if recompute else 0
    return 2 + Fraction(more, max(_flops(rows, up, down), 1))


def _hidden(rows: int, up: Tensor, recompute: bool) -> int:
    return 0 if recompute else int(rows * up.shape[1] * up.element_size())


@op(
    flops=lambda tokens, order, weights, ends, up, down, *_, **__: _flops(
        order.shape[0], up, down
    ),
    backward=lambda tokens, order, weights, ends, up, down, up_bias=None, down_bias=None, *, activation, recompute=False, **_: (
        _backward(order.shape[0], up, down, up_bias, down_bias, recompute)
    ),
    saves=("tokens", "order", "weights", "ends"),
    extra=lambda tokens, order, weights, ends, up, down, *_, recompute=False, **__: (
        _hidden(order.shape[0], up, recompute)
    ),
)
def routed_feed_forward(
    tokens: Tensor,
    order: Tensor,
    weights: Tensor,
    ends: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: Callable[..., Tensor],
    recompute: bool = False,
    **settings: Any,
) -> Tensor:
    """Every token's experts, summed by weight: tokens [T, d], weights [T, K] -> [T, d].

    up [E, 2n, d], gates first, or [E, n, d] where the activation takes one tensor; down
    [E, d, n]; biases [E, 2n] or [E, n], and [E, d]; settings go to the activation. Backward keeps
    tokens and the first product [N, 2n], or with `recompute` tokens alone. Choices of no expert
    (rows from ends[-1] on) add nothing and get no gradient.
    """
    apply = _gated(activation, up.shape[1] != down.shape[2], settings)
    parameters = (up, down, up_bias, down_bias)
    return _run(tokens, order, weights, ends, parameters, apply, recompute)


@op(
    flops=lambda rows, ends, up, down, *_, **__: _flops(rows.shape[0], up, down),
    backward=lambda rows, ends, up, down, up_bias=None, down_bias=None, *, activation, recompute=False, **_: (
        _backward(rows.shape[0], up, down, up_bias, down_bias, recompute)
    ),
    saves=("rows", "ends"),
    extra=lambda rows, ends, up, down, *_, recompute=False, **__: _hidden(
        rows.shape[0], up, recompute
    ),
)
def grouped_feed_forward(
    rows: Tensor,
    ends: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: Callable[..., Tensor],
    recompute: bool = False,
    **settings: Any,
) -> Tensor:
    """Each expert's network on rows that are already its own: rows [N, d] -> [N, d].

    Parameters as for routed_feed_forward. Rows of no expert, from ends[-1] on, give zeros and get
    zero gradients, whatever they hold.
    """
    apply = _gated(activation, up.shape[1] != down.shape[2], settings)
    parameters = (up, down, up_bias, down_bias)
    return _run(rows, None, None, ends, parameters, apply, recompute)
