"""A routed layer's experts in one op, whose backward pass keeps the tokens and one product.

Rows are those of experts.py: row i is flattened choice order[i], grouped by expert up to `ends`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.activations import _pull
from moegen.ops.experts import (
    _grouped_linear,
    _grouped_outer,
    _inverse,
    _starts,
    _sum_entries,
)
from moegen.ops.feed_forward_work import grouped_work, routed_work
from moegen.ops.op import op


class _Layer(NamedTuple):
    """Experts and what they work on: the activation takes two halves if up has rows for both.

    owner [N] is the token of each row, None where tokens are the rows; share [N, 1] what a row has
    of its token's gradient, None for all of it.
    """

    activation: partial[Tensor]
    tokens: Tensor
    owner: Tensor | None
    share: Tensor | None
    ends: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None

    def halves(self, hidden: Tensor) -> tuple[Tensor, ...]:
        gated = self.up.shape[1] != self.down.shape[2]
        return hidden.chunk(2, -1) if gated else (hidden,)


class _FeedForward(torch.autograd.Function):
    """Gathers rows, applies both products with the activation between, and sums rows by weight.

    Rows and activations are computed again in the backward pass, and nothing of the second
    product is kept: the gradient of a weight follows from the gradient of its row's activation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activation: partial[Tensor],
        keep: bool,
        tokens: Tensor,
        order: Tensor | None,
        weights: Tensor | None,
        ends: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        owner = None if order is None else _owners(tokens, order)
        layer = _Layer(activation, tokens, owner, None, ends, *parameters)  # type: ignore[arg-type]
        out, hidden = _outputs(layer, keep)
        ctx.activation = activation
        ctx.save_for_backward(tokens, order, weights, ends, hidden, *parameters)
        if order is None or weights is None:
            return out
        starts = _starts(order, tokens.shape[0])
        shares = weights.to(out.dtype).flatten()
        return _sum_entries(out, _inverse(order), starts, shares)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("experts as one op have no gradient of their gradient")
        tokens, order, weights, ends, hidden, *parameters = ctx.saved_tensors
        owner, share = None, None
        if order is not None:
            owner = _owners(tokens, order)
            share = weights.to(grad.dtype).flatten().index_select(0, order)
            share = share.unsqueeze(-1)
        layer = _Layer(ctx.activation, tokens, owner, share, ends, *parameters)
        needs = zip(_INPUTS, ctx.needs_input_grad[2:], strict=True)
        wanted = [name for name, needed in needs if needed]
        grad = grad.contiguous()
        found = _gradients(layer, hidden, grad, wanted)
        if "tokens" in found:
            found["tokens"] = _sum_tokens(found["tokens"], order, tokens.shape[0])
        if "weights" in found:
            found["weights"] = _by_choice(found["weights"], order, weights)
        return None, None, *(found.get(name) for name in _INPUTS)


_INPUTS = (
    *("tokens", "order", "weights", "ends"),
    *("up", "down", "up_bias", "down_bias"),
)


def _outputs(layer: _Layer, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The output of every row [N, d], and the first product [N, 2n] if it is to be kept."""
    rows = _rows(layer.tokens, layer.owner)
    hidden = _project(rows, layer.up, layer.up_bias, layer.ends)
    active = layer.activation(*layer.halves(hidden))
    out = _project(active, layer.down, layer.down_bias, layer.ends)
    return out, hidden if keep else None


def _gradients(
    layer: _Layer, hidden: Tensor | None, grad: Tensor, wanted: list[str]
) -> dict[str, Tensor]:
    """Gradients by name: of parameters, and row by row of tokens [N, d] and weights [N].

    hidden [N, 2n] is the first product if it was kept, grad the gradient of tokens' outputs.
    """
    tokens, owner, share, ends = layer.tokens, layer.owner, layer.share, layer.ends
    up, down, up_bias, down_bias = layer.up, layer.down, layer.up_bias, layer.down_bias
    rows, grad = _rows(tokens, owner), _rows(grad, owner)
    if hidden is None:
        hidden = _project(rows, up, up_bias, ends)
    found: dict[str, Tensor] = {}
    active, pull = _pull(layer.activation, layer.halves(hidden))
    back = _grouped_linear(grad, down.transpose(1, 2), ends)
    ones = grad.new_ones(grad.shape[0], 1)
    if "weights" in wanted:
        wide = torch.promote_types(grad.dtype, torch.float32)
        of_row = (back * active).sum(-1, dtype=wide)
        if down_bias is not None:
            of_bias = grad * _of_rows(down_bias, grad, ends)
            of_row = of_row + of_bias.sum(-1, dtype=wide)
        found["weights"] = of_row
    if share is not None:
        back, active = back * share, active * share
    if "down" in wanted:
        found["down"] = _grouped_outer(grad, active, ends)
    if "down_bias" in wanted:
        part = ones if share is None else share
        found["down_bias"] = _grouped_outer(grad, part, ends).squeeze(-1)
    halves = pull(back)
    back = halves[0] if len(halves) == 1 else torch.cat(halves, -1)
    if "up" in wanted:
        found["up"] = _grouped_outer(back, rows, ends)
    if "up_bias" in wanted:
        found["up_bias"] = _grouped_outer(back, ones, ends).squeeze(-1)
    if "tokens" in wanted:
        found["tokens"] = _grouped_linear(back, up.transpose(1, 2), ends)
    return found


def _owners(tokens: Tensor, order: Tensor) -> Tensor:
    """The token of every row [N]."""
    k = order.shape[0] // max(tokens.shape[0], 1)
    return order // max(k, 1)


def _rows(tokens: Tensor, owner: Tensor | None) -> Tensor:
    """The token of every row, or the rows themselves where no owner is given."""
    return tokens if owner is None else tokens.index_select(0, owner)


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    out: Tensor = _grouped_linear(rows, weight, ends)
    return out if bias is None else out + _of_rows(bias, out, ends)


def _of_rows(bias: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """The bias of each row's expert, [N, n]; zero for rows of no expert."""
    row = torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype)
    expert = torch.searchsorted(ends, row, right=True)
    return F.pad(bias, (0, 0, 0, 1)).index_select(0, expert)


def _by_choice(of_row: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Values of rows [N] where their choices are, in the shape and format of weights [T, K]."""
    placed = torch.empty_like(of_row).scatter_(0, order, of_row)
    return placed.view(weights.shape).to(weights.dtype)


def _sum_tokens(rows: Tensor, order: Tensor | None, num_tokens: int) -> Tensor:
    if order is None:
        return rows
    return _sum_entries(rows, _inverse(order), _starts(order, num_tokens), None)


def _run(
    tokens: Tensor,
    order: Tensor | None,
    weights: Tensor | None,
    ends: Tensor,
    parameters: tuple[Tensor | None, ...],
    activation: partial[Tensor],
    recompute: bool,
) -> Tensor:
    """In the format of the parameters, or of autocast."""
    kind = tokens.device.type
    dtype = parameters[0].dtype if parameters[0] is not None else tokens.dtype
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    cast = (p if p is None else p.to(dtype) for p in parameters)
    keep = torch.is_grad_enabled() and not recompute
    return _FeedForward.apply(  # type: ignore[no-any-return, no-untyped-call]
        activation, keep, tokens.to(dtype), order, weights, ends, *cast
    )


@op(
    flops=lambda *args, **named: routed_work(*args, **named).flops,
    backward=lambda *args, **named: routed_work(*args, **named).backward,
    shares=lambda *args, **named: routed_work(*args, **named).shares,
    saves=lambda *args, **named: routed_work(*args, **named).saves,
    extra=lambda *args, **named: routed_work(*args, **named).extra,
    inside=lambda *args, **named: routed_work(*args, **named).inside,
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
    permute: bool = False,
    **settings: Any,
) -> Tensor:
    """Every token's experts, summed by weight: tokens [T, d], weights [T, K] -> [T, d].

    up [E, 2n, d], gates first, or [E, n, d] where the activation takes one tensor; down
    [E, d, n]; biases [E, 2n] or [E, n], and [E, d]; settings go to the activation. Backward keeps
    tokens and the first product [N, 2n], or with `recompute` tokens alone. Choices of no expert
    (rows from ends[-1] on) add nothing and get no gradient. Rows are copied into their order, so
    `permute`, which asks for that, changes nothing.
    """
    apply = partial(activation, **settings)
    parameters = (up, down, up_bias, down_bias)
    return _run(tokens, order, weights, ends, parameters, apply, recompute)


@op(
    flops=lambda *args, **named: grouped_work(*args, **named).flops,
    backward=lambda *args, **named: grouped_work(*args, **named).backward,
    shares=lambda *args, **named: grouped_work(*args, **named).shares,
    saves=lambda *args, **named: grouped_work(*args, **named).saves,
    extra=lambda *args, **named: grouped_work(*args, **named).extra,
    inside=lambda *args, **named: grouped_work(*args, **named).inside,
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
    apply = partial(activation, **settings)
    parameters = (up, down, up_bias, down_bias)
    return _run(rows, None, None, ends, parameters, apply, recompute)
