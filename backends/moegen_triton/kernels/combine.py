"""Rows of tokens: gathered from them, and summed back to them by weight.

T tokens with K choices each give N = T * K rows; order [N] says which flattened choice a row is.
Sums run over a token's choices in their order, so they are the same from run to run.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .device import check_formats, narrow
from .dispatch import inverse
from .library import define


@triton.jit
def _sum_kernel(
    rows,
    inverse,
    ends,
    weights,
    out,
    width,
    stride,
    num_rows,
    num_experts,
    K: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Each program sums BLOCK columns of one token's rows."""
    parts = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // parts).to(tl.int64)
    column = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    limit = num_rows
    if HAS_ENDS:
        limit = tl.load(ends + num_experts - 1)
    for k in tl.range(0, K, loop_unroll_factor=UNROLL):
        row = tl.load(inverse + token * K + k)
        share = tl.full((), 1.0, tl.float32)
        if HAS_WEIGHTS:  # whatever it is, for a row of no expert
            share = tl.load(weights + token * K + k, mask=row < limit, other=0.0)
            share = share.to(tl.float32)
        here = column < tl.where(row < limit, width, 0)
        value = tl.load(rows + row.to(tl.int64) * stride + column, mask=here, other=0.0)
        total += value.to(tl.float32) * share
    at = out + token * width + column
    tl.store(at, narrow(total, out.dtype.element_ty), mask=inside)


@triton.jit
def _gather_kernel(
    tokens, order, out, width, stride, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Each program copies BLOCK columns of one row."""
    parts = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    column = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(order + row).to(tl.int64) // K
    value = tl.load(tokens + token * stride + column, mask=column < width)
    tl.store(out + row * width + column, value, mask=column < width)


@triton.jit
def _combine_gradient_kernel(
    grad,
    rows,
    inverse,
    weights,
    grad_rows,
    grad_weights,
    width,
    grad_stride,
    stride,
    K: tl.constexpr,
    WANTS_ROWS: tl.constexpr,
    WANTS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes one choice; those of a token follow one another, and share its grad."""
    choice = tl.program_id(0).to(tl.int64)
    token = choice // K
    row = tl.load(inverse + choice).to(tl.int64)
    weight = tl.load(weights + choice).to(tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        here = column < width
        slope = tl.load(grad + token * grad_stride + column, mask=here, other=0.0)
        slope = slope.to(tl.float32)
        if WANTS_ROWS:
            scaled = narrow(slope * weight, grad_rows.dtype.element_ty)
            tl.store(grad_rows + row * width + column, scaled, mask=here)
        if WANTS_WEIGHTS:
            value = tl.load(rows + row * stride + column, mask=here, other=0.0)
            product += slope * value.to(tl.float32)
    if WANTS_WEIGHTS:
        share = tl.sum(product, 0)
        tl.store(grad_weights + choice, narrow(share, grad_weights.dtype.element_ty))


def _block(width: int) -> int:
    """Columns of a program: as many as fit without more padding than the fewest."""
    if width <= 256:
        return max(16, int(triton.next_power_of_2(width)))
    return min((1024, 512, 256), key=lambda block: triton.cdiv(width, block) * block)


def _warps(block: int) -> int:
    """So that every thread has eight columns: 16 bytes, in 16 bits."""
    return max(1, block // 256)


def _dense(x: Tensor) -> Tensor:
    """x [N, d], whose rows may lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def combine_rows_of_tokens(
    rows: Tensor,
    inverse: Tensor,
    ends: Tensor | None,
    weights: Tensor | None,
    num_tokens: int,
) -> Tensor:
    """Each token's rows summed, by weight if there are any: rows [N, d] -> [T, d].

    inverse [N] is the row of each flattened choice. With ends [E], rows from ends[-1] on count for
    nothing, whatever they and their weights hold. Sums are in float32, the result as rows are.
    """
    rows = _dense(rows)
    width, k = rows.shape[1], rows.shape[0] // max(num_tokens, 1)
    out = rows.new_empty(num_tokens, width)
    if k == 0 or width == 0:
        return out.zero_()
    block = _block(width)
    _sum_kernel[(num_tokens * triton.cdiv(width, block),)](
        rows,
        inverse,
        ends,
        None if weights is None else weights.contiguous(),
        out,
        width,
        rows.stride(0),
        rows.shape[0],
        0 if ends is None else ends.shape[0],
        K=k,
        HAS_ENDS=ends is not None,
        HAS_WEIGHTS=weights is not None,
        BLOCK=block,
        UNROLL=min(k, 8),
        num_warps=_warps(block),
    )
    return out


def gather(tokens: Tensor, order: Tensor) -> Tensor:
    """The token of every row, as the op gather_rows but without a gradient."""
    tokens = _dense(tokens)
    total, width = order.shape[0], tokens.shape[1]
    out = tokens.new_empty(total, width)
    if out.numel():
        block = _block(width)
        _gather_kernel[(total * triton.cdiv(width, block),)](
            tokens,
            order,
            out,
            width,
            tokens.stride(0),
            K=total // tokens.shape[0],
            BLOCK=block,
            num_warps=_warps(block),
        )
    return out


def _gather_fake(tokens: Tensor, order: Tensor) -> Tensor:
    return tokens.new_empty(order.shape[0], tokens.shape[1])


def _gather_save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    tokens, order = inputs
    ctx.save_for_backward(order)
    ctx.num_tokens = tokens.shape[0]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _scatter(grad, ctx.saved_tensors[0], ctx.num_tokens), None


def _scatter_launch(rows: Tensor, order: Tensor, num_tokens: int) -> Tensor:
    return combine_rows_of_tokens(rows, inverse(order), None, None, num_tokens)


def _scatter_fake(rows: Tensor, order: Tensor, num_tokens: int) -> Tensor:
    return rows.new_empty(num_tokens, rows.shape[1])


def _combine_launch(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    check_formats(rows, weights)
    num_tokens = weights.shape[0]
    return combine_rows_of_tokens(rows, inverse(order), None, weights, num_tokens)


def _combine_fake(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(weights.shape[0], rows.shape[1])


def _combine_save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, None, Tensor | None]:
    wants_rows, _, wants_weights = ctx.needs_input_grad
    found = _combine_gradient(grad, *ctx.saved_tensors, wants_rows, wants_weights)
    return found[0] if wants_rows else None, None, found[1] if wants_weights else None


def _combine_gradient_launch(
    grad: Tensor,
    rows: Tensor,
    order: Tensor,
    weights: Tensor,
    wants_rows: bool,
    wants_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights in one pass; what is not wanted is empty."""
    grad, rows = _dense(grad), _dense(rows)
    shapes = (rows, order, weights, wants_rows, wants_weights)
    grad_rows, grad_weights = _combine_gradient_fake(grad, *shapes)
    if rows.numel() == 0:
        return grad_rows, grad_weights.zero_()
    block = _block(rows.shape[1])
    _combine_gradient_kernel[(rows.shape[0],)](
        grad,
        rows,
        inverse(order),
        weights.contiguous(),
        grad_rows,
        grad_weights,
        rows.shape[1],
        grad.stride(0),
        rows.stride(0),
        K=weights.shape[1],
        WANTS_ROWS=wants_rows,
        WANTS_WEIGHTS=wants_weights,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return grad_rows, grad_weights


def _combine_gradient_fake(
    grad: Tensor,
    rows: Tensor,
    order: Tensor,
    weights: Tensor,
    wants_rows: bool,
    wants_weights: bool,
) -> tuple[Tensor, Tensor]:
    return (
        rows.new_empty(rows.shape if wants_rows else (0,)),
        weights.new_empty(weights.shape if wants_weights else (0,)),
    )


_scatter = define(__name__, "sum_of_rows", _scatter_launch, _scatter_fake)
_gather = define(
    __name__, "gather_rows", gather, _gather_fake, _gather_save, _gather_backward
)
_combine_gradient = define(
    __name__, "combine_gradient", _combine_gradient_launch, _combine_gradient_fake
)
_combine = define(
    __name__,
    "combine",
    _combine_launch,
    _combine_fake,
    _combine_save,
    _combine_backward,
)


def gather_rows(tokens: Tensor, order: Tensor) -> Tensor:
    """The token of every row: tokens [T, d], order [N] -> [N, d]."""
    return _gather(tokens, order)  # type: ignore[no-any-return]


def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Sum each token's rows by weight: rows [N, d], order [N], weights [T, K] -> [T, d].

    Kept for the backward pass: all three. Weights may have another format than rows.
    """
    return _combine(rows, order, weights)  # type: ignore[no-any-return]
