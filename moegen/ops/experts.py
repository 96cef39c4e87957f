"""The rows of a routed layer: gathered from tokens, multiplied by experts, summed back to tokens.

T tokens with K choices each give N = T * K rows, grouped by expert: `order` [N] says which
flattened choice a row is (so token = order // K), `ends` [E] int32 where each expert's rows end.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.op import op


def _define(
    name: str, kernel: Callable[..., Tensor], fake: Any, save: Any, backward: Any
) -> Any:
    """A torch.library op, which compile and export take whole.

    A process may hold several copies of this file, each in its own package: the first defines
    the op and the others use that one, so a change in meaning needs a change of name.
    """
    if not hasattr(torch.ops.moegen, name):
        definition = torch.library.custom_op(f"moegen::{name}", kernel, mutates_args=())
        definition.register_fake(fake)
        definition.register_autograd(backward, setup_context=save)
    return getattr(torch.ops.moegen, name)


def _inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation [N]; indices do not repeat, so the scatter is deterministic."""
    return torch.empty_like(order).scatter_(
        0, order, torch.arange(order.shape[0], device=order.device)
    )


def _starts(order: Tensor, num_tokens: int) -> Tensor:
    """Where the choices of each token start among all N, K of them a token -> [T]."""
    return torch.arange(num_tokens, device=order.device) * (
        order.shape[0] // max(num_tokens, 1)
    )


def _sum_entries(
    rows: Tensor, entries: Tensor, starts: Tensor, weight: Tensor | None
) -> Tensor:
    """Weighted sums of rows[entries] over the runs that begin at starts, fused, without atomics."""
    return F.embedding_bag(entries, rows, starts, mode="sum", per_sample_weights=weight)


def _gather_rows_kernel(tokens: Tensor, order: Tensor) -> Tensor:
    """Row i is token order[i] // K; the gradient sums a token's rows: no scatter, no atomics."""
    k = order.shape[0] // max(tokens.shape[0], 1)
    return tokens.index_select(0, order // max(k, 1))


def _gather_rows_fake(tokens: Tensor, order: Tensor) -> Tensor:
    return tokens.new_empty(order.shape[0], tokens.shape[1])


def _gather_rows_save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    tokens, order = inputs
    ctx.save_for_backward(order)
    ctx.num_tokens = tokens.shape[0]


def _gather_rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (order,) = ctx.saved_tensors
    starts = _starts(order, ctx.num_tokens)
    return _sum_entries(grad.contiguous(), _inverse(order), starts, None), None


def _sum_rows_kernel(
    rows: Tensor, weight: Tensor, order: Tensor, starts: Tensor, token: Tensor
) -> Tensor:
    """Sum rows by token: weight [N] is sorted by token, entry order[i] belongs to row i.

    Token t owns the entries from starts[t] on; token [N], that of each row, serves the gradient.
    """
    return _sum_entries(rows.contiguous(), _inverse(order), starts, weight)


def _sum_rows_fake(
    rows: Tensor, weight: Tensor, order: Tensor, starts: Tensor, token: Tensor
) -> Tensor:
    return rows.new_empty(starts.shape[0], rows.shape[1])


def _sum_rows_save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    rows, weight, order, _, token = inputs
    ctx.save_for_backward(rows, weight, order, token)


def _sum_rows_backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor, Tensor, None, None, None]:
    rows, weight, order, token = ctx.saved_tensors
    grad_rows = grad.index_select(0, token)
    grad_weight = torch.empty_like(weight).scatter_(
        0, order, (grad_rows * rows).sum(-1)
    )
    # Scaled in place: one buffer of all rows less in the backward pass.
    grad_rows.mul_(weight.index_select(0, order).unsqueeze(-1))
    return grad_rows, grad_weight, None, None, None


_gather_rows = _define(
    "gather_rows",
    _gather_rows_kernel,
    _gather_rows_fake,
    _gather_rows_save,
    _gather_rows_backward,
)
_sum_rows = _define(
    "sum_rows", _sum_rows_kernel, _sum_rows_fake, _sum_rows_save, _sum_rows_backward
)


@op(flops=lambda tokens, order: 0, saves=("order",))
def gather_rows(tokens: Tensor, order: Tensor) -> Tensor:
    """The token of every row: tokens [T, d], order [N] -> [N, d]."""
    return _gather_rows(tokens, order)  # type: ignore[no-any-return]


def _combine_saves(rows: Tensor, order: Tensor, weight: Tensor) -> tuple[str, ...]:
    """Weights are kept in the rows' format, so a copy of them where they have another."""
    same = rows.dtype == weight.dtype
    return ("rows", "order", "weight") if same else ("rows", "order")


def _combine_extra(rows: Tensor, order: Tensor, weight: Tensor) -> int:
    """Bytes of a number a row, and of converted weights."""
    copy = 0 if rows.dtype == weight.dtype else rows.element_size()
    return (8 + copy) * order.shape[0]


@op(saves=_combine_saves, extra=_combine_extra)
def combine(rows: Tensor, order: Tensor, weight: Tensor) -> Tensor:
    """Sum each token's rows by weight: rows [N, d], order [N], weight [T, K] -> [T, d]."""
    num_tokens, k = weight.shape
    weight = weight.to(rows.dtype).flatten()
    starts = _starts(order, num_tokens)
    return _sum_rows(rows, weight, order, starts, order // k)  # type: ignore[no-any-return]


@op(
    saves=lambda rows, token, weight, num_tokens: (
        ("rows", "token", *(("weight",) if rows.dtype == weight.dtype else ()))
    ),
    extra=lambda rows, token, weight, num_tokens: (
        _combine_extra(rows, token, weight) + (8 + rows.element_size()) * token.shape[0]
    ),
)
def combine_rows(
    rows: Tensor, token: Tensor, weight: Tensor, num_tokens: int
) -> Tensor:
    """Sum rows by weight where a token may own any number: rows [N, d], token [N] -> [T, d]."""
    owners, entries = torch.sort(token, stable=True)
    starts = torch.searchsorted(owners, torch.arange(num_tokens, device=token.device))
    weight = weight.to(rows.dtype).gather(0, entries)
    return _sum_rows(rows, weight, _inverse(entries), starts, token)  # type: ignore[no-any-return]


def _aligned(x: Tensor) -> Tensor:
    """The matrices x [..., r, c] as grouped_mm reads them: strides of one and of whole 16 bytes."""
    if x.stride(-1) != 1 and x.stride(-2) == 1:
        return _aligned(x.transpose(-1, -2)).transpose(-1, -2)
    step, width = 16 // x.element_size(), x.shape[-1]
    whole = (
        all(stride % step == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    )
    if whole and x.stride(-1) == 1 and x.stride(-2) >= width:
        return x
    padded = x.new_zeros(*x.shape[:-1], -(-width // step) * step)
    return padded.narrow(-1, 0, width).copy_(x)


def _zero_tail(rows: Tensor, ends: Tensor) -> Tensor:
    """Zeros, in place, for the rows [N, n] of no expert, which grouped_mm leaves uninitialised."""
    if rows.device.type == "cpu":
        rows[int(ends[-1]) :] = 0
        return rows
    row = torch.arange(rows.shape[0], device=rows.device)
    return rows.masked_fill_(
        (row >= ends[-1]).unsqueeze(-1), 0
    )  # ends stays on the device


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    """(start, end) of every expert, for float64, which grouped_mm lacks: it checks, not trains."""
    stops = ends.tolist()
    return list(zip([0, *stops], stops, strict=False))


def _grouped_linear_kernel(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [N, d] of expert e times weight[e].T -> [N, n]."""
    if rows.shape[0] == 0 or rows.dtype == torch.float64:
        out = rows.new_zeros(rows.shape[0], weight.shape[1])
        for matrix, (start, end) in zip(weight, _spans(ends), strict=True):
            torch.mm(rows[start:end], matrix.t(), out=out[start:end])
        return out
    out = F.grouped_mm(_aligned(rows), _aligned(weight).transpose(1, 2), offs=ends)
    return _zero_tail(out.contiguous(), ends)  # CUDA pads odd widths


def _grouped_outer_kernel(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left [N, n] transposed times right [N, d], within each expert -> [E, n, d]."""
    if left.shape[0] == 0 or left.dtype == torch.float64:
        out = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
        for matrix, (start, end) in zip(out, _spans(ends), strict=True):
            torch.mm(left[start:end].t(), right[start:end], out=matrix)
        return out
    return F.grouped_mm(_aligned(left).t(), _aligned(right), offs=ends).contiguous()


def _grouped_linear_fake(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _grouped_outer_fake(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_linear_backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, ends = ctx.saved_tensors
    wants_rows, wants_weight, _ = ctx.needs_input_grad
    return (
        _grouped_linear(grad, weight.transpose(1, 2), ends) if wants_rows else None,
        _grouped_outer(grad, rows, ends) if wants_weight else None,
        None,
    )


def _grouped_outer_backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    left, right, ends = ctx.saved_tensors
    wants_left, wants_right, _ = ctx.needs_input_grad
    return (
        _grouped_linear(right, grad, ends) if wants_left else None,
        _grouped_linear(left, grad.transpose(1, 2), ends) if wants_right else None,
        None,
    )


_grouped_linear = _define(
    "grouped_linear",
    _grouped_linear_kernel,
    _grouped_linear_fake,
    _save_inputs,
    _grouped_linear_backward,
)
_grouped_outer = _define(
    "grouped_outer",
    _grouped_outer_kernel,
    _grouped_outer_fake,
    _save_inputs,
    _grouped_outer_backward,
)


@op(
    flops=lambda rows, weight, ends: (
        2 * rows.shape[0] * weight.shape[1] * weight.shape[2]
    ),
    saves=("rows", "weight", "ends"),
)
def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix: rows [N, d], weight [E, n, d] -> [N, n].

    Rows of no expert, from ends[-1] on, give zeros and get zero gradients, whatever they hold.
    """
    # Under autocast rows may come from a product in 16 bits.
    return _grouped_linear(rows.to(weight.dtype), weight, ends)  # type: ignore[no-any-return]


@op(
    flops=lambda rows, bias, ends: 2 * rows.shape[0] * rows.shape[1],
    backward=1.0,
    saves=("bias", "ends"),
    extra=lambda rows, bias, ends: rows.shape[0] * rows.element_size(),
)
def grouped_bias(rows: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    """Add to each row the bias of its expert: rows [N, n], bias [E, n] -> [N, n]."""
    # As a product with a column of ones, so that the gradient sums rows without atomics and rows
    # of no expert get nothing.
    ones = rows.new_ones(rows.shape[0], 1)
    return rows + _grouped_linear(ones, bias.unsqueeze(-1), ends)  # type: ignore[no-any-return]
