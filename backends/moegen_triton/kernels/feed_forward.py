"""Routed experts as one op: gather, two products, activation, and sum by weight.

T tokens with K choices each give N = T * K rows, grouped by expert: row i is flattened
choice order[i], so of token order[i] // K; expert e's rows end at ends[e]. Rows from
ends[-1] on belong to no expert. Kept for the backward pass are the tokens and the hidden
values before the activation, or the tokens alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .activations import is_gated, kernel_name
from .combine import combine_rows_of_tokens, gather
from .device import check_formats
from .dispatch import inverse
from .down import down as multiply
from .hidden_gradient import hidden_gradient
from .library import define
from .matrices import Tables
from .up import up as project
from .weight_gradient import weight_gradient

# Of the op's arguments, those that may need gradients, in the order of `wants`.
LEARNT = (0, 2, 4, 5, 6, 7)


def _choices(tokens: Tensor, order: Tensor | None) -> int:
    """K, the choices of a token."""
    return 1 if order is None else order.shape[0] // max(tokens.shape[0], 1)


def _rows(
    x: Tensor, order: Tensor | None, permute: bool
) -> tuple[Tensor, Tensor | None]:
    """x for kernels and the order they gather it in, None if its rows are in place."""
    if order is None or not permute:
        return x, order
    return gather(x, order), None


def _forward(
    tokens: Tensor,
    order: Tensor | None,
    weights: Tensor | None,
    ends: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    limit: float,
    alpha: float,
    save: bool,
    permute: bool,
) -> tuple[Tensor, Tensor]:
    """The output, [T, d] or without an order [N, d], and hidden [N, 2n or n] if saved."""
    settings = {"limit": limit, "alpha": alpha}
    k = _choices(tokens, order)
    x, gathered = _rows(tokens, order, permute)
    tables = Tables()
    hidden, active = project(
        x, gathered, k, up, up_bias, ends, activation, settings, save, tables
    )
    zero_tail = order is None
    rows = multiply(active, down, down_bias, ends, zero_tail=zero_tail, tables=tables)
    hidden = rows.new_empty(0, up.shape[1]) if hidden is None else hidden
    if order is None:
        return rows, hidden
    count = tokens.shape[0]
    return combine_rows_of_tokens(rows, inverse(order), ends, weights, count), hidden


def _forward_fake(
    tokens: Tensor,
    order: Tensor | None,
    weights: Tensor | None,
    ends: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    limit: float,
    alpha: float,
    save: bool,
    permute: bool,
) -> tuple[Tensor, Tensor]:
    rows = tokens.shape[0] if order is None else order.shape[0]
    hidden = tokens.new_empty(rows if save else 0, up.shape[1])
    return tokens.new_empty(tokens.shape[0], down.shape[1]), hidden


def _backward(
    grad: Tensor,
    tokens: Tensor,
    order: Tensor | None,
    weights: Tensor | None,
    ends: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    hidden: Tensor | None,
    activation: str,
    limit: float,
    alpha: float,
    permute: bool,
    wants: list[bool],
) -> list[Tensor]:
    """Gradients of tokens, weights, up, down, up_bias and down_bias that are wanted."""
    settings, tables = {"limit": limit, "alpha": alpha}, Tables()
    wants_tokens, wants_weights, wants_up, wants_down, wants_up_bias, wants_bias = wants
    k, moved = _choices(tokens, order), order is not None and permute
    x, gathered = _rows(tokens, order, permute)
    if hidden is None:
        hidden, _ = project(
            x, gathered, k, up, up_bias, ends, activation, settings, True, tables
        )
        assert hidden is not None
    grad, _ = _rows(grad, order, permute)
    d_hidden, active, d_weights = hidden_gradient(
        grad, order, k, weights, ends, down, down_bias, hidden, activation, settings,
        wants_weights, permuted=moved,
    )  # fmt: skip
    found: list[Tensor | None] = [None] * len(wants)
    found[1] = d_weights
    if wants_down or wants_bias:
        found[3], found[5] = weight_gradient(
            grad, active, order, k, "left" if gathered is not None else "none", ends,
            weights, wants_bias,
        )  # fmt: skip
    del active
    if wants_up or wants_up_bias:
        found[2], found[4] = weight_gradient(
            d_hidden, x, gathered, k, "right" if gathered is not None else "none", ends,
            None, wants_up_bias,
        )  # fmt: skip
    if wants_tokens:
        rows = multiply(
            d_hidden, up, None, ends, True, zero_tail=order is None, tables=tables
        )
        if order is not None:
            count = tokens.shape[0]
            rows = combine_rows_of_tokens(rows, inverse(order), ends, None, count)
        found[0] = rows
    pairs = zip(found, wants, strict=True)
    return [x for x, wanted in pairs if wanted and x is not None]


def _backward_fake(
    grad: Tensor,
    tokens: Tensor,
    order: Tensor | None,
    weights: Tensor | None,
    ends: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    hidden: Tensor | None,
    activation: str,
    limit: float,
    alpha: float,
    permute: bool,
    wants: list[bool],
) -> list[Tensor]:
    inputs = (tokens, weights, up, down, up_bias, down_bias)
    pairs = zip(inputs, wants, strict=True)
    return [x.new_empty(x.shape) for x, wanted in pairs if wanted and x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, activation, limit, alpha, saved, permute = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, hidden if saved else None)
    ctx.constants = (activation, limit, alpha, permute)


def _differentiate(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad is None:
        return tuple(grads)
    wants = [ctx.needs_input_grad[i] for i in LEARNT]
    found = iter(
        _feed_forward_backward(grad, *ctx.saved_tensors, *ctx.constants, wants)
    )
    for i, wanted in zip(LEARNT, wants, strict=True):
        if wanted:
            grads[i] = next(found)
    return tuple(grads)


_feed_forward = define(
    __name__, "feed_forward", _forward, _forward_fake, _save, _differentiate
)
_feed_forward_backward = define(
    __name__, "feed_forward_backward", _backward, _backward_fake
)


def _run(
    tokens: Tensor,
    order: Tensor | None,
    weights: Tensor | None,
    ends: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    activation: Callable[..., Tensor],
    recompute: bool,
    permute: bool,
    approximate: str = "none",
    limit: float = 7.0,
    alpha: float = 1.702,
) -> Tensor:
    """In the format of the parameters, or of autocast."""
    name = kernel_name(activation.__name__, approximate)
    up, down = parameters[:2]
    if up.shape[1] != down.shape[2] * (2 if is_gated(name) else 1):
        raise ValueError(
            f"{name} does not lead from up {tuple(up.shape)} to down {tuple(down.shape)}"
        )
    dtype, kind = up.dtype, tokens.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    cast = [x if x is None else x.to(dtype) for x in (tokens, *parameters)]
    check_formats(*cast, weights)
    learnt = (*cast, weights)
    differentiates = any(x is not None and x.requires_grad for x in learnt)
    save = torch.is_grad_enabled() and differentiates and not recompute
    out, _ = _feed_forward(
        cast[0], order, weights, ends, *cast[1:], name, limit, alpha, save, permute
    )
    return out  # type: ignore[no-any-return]


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
    permute: bool = False,
    **settings: Any,
) -> Tensor:
    """Every token's experts, summed by weight: tokens [T, d], weights [T, K] -> [T, d].

    up [E, 2n, d], gates first, or [E, n, d] where the activation takes one tensor; down
    [E, d, n]; biases [E, 2n] or [E, n], and [E, d]; settings go to the activation, which
    kernels know by its name. Backward keeps tokens and the first product [N, 2n], or
    with `recompute` tokens alone. With `permute` rows are copied into their order first,
    which suits wide experts. Choices of no expert add nothing and get no gradient.
    """
    parameters = (up, down, up_bias, down_bias)
    return _run(
        tokens, order, weights, ends, parameters, activation, recompute, permute,
        **settings,
    )  # fmt: skip


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

    Parameters as for routed_feed_forward. Rows of no expert, from ends[-1] on, give zeros
    and get zero gradients, whatever they hold.
    """
    parameters = (up, down, up_bias, down_bias)
    return _run(
        rows, None, None, ends, parameters, activation, recompute, False, **settings
    )
