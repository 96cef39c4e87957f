"""The backward pass through down-projection and activation, in one kernel.

From the gradient of the layer's output it makes that of the hidden values before the
activation, the activated values times the router's weights, which the gradient of the
down-projection needs, and the gradient of the router's weights.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate_with_slopes, constants
from .device import check_formats, dot, narrow, precision
from .dispatch import tile_table
from .matrices import (
    column_parts,
    describe_rows,
    describe_weight,
    load_rows,
    load_weight,
    swizzle,
)
from .tiles import choose


@triton.jit
def _finish(
    d_active, hidden, d_hidden, active, row, is_row, column, n, share,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
):  # fmt: skip
    """Store what follows from a tile's gradient of activated values, unscaled.

    Gives the sums over each row of that gradient times the activated values.
    """
    columns = column + tl.arange(0, d_active.shape[1])
    inside = is_row[:, None] & (columns < n)[None, :]
    width: tl.constexpr = 2 if GATED else 1
    at = row[:, None] * (width * n) + columns[None, :]
    gate = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    up = gate
    if GATED:
        up = tl.load(hidden + at + n, mask=inside, other=0.0).to(tl.float32)
    value, by_gate, by_up = activate_with_slopes(
        gate, up, GATED, ACTIVATION, LIMIT, ALPHA
    )
    sums = tl.sum(tl.where(inside, d_active * value, 0.0), 1)
    d_active *= share[:, None]
    kind = d_hidden.dtype.element_ty
    tl.store(d_hidden + at, narrow(d_active * by_gate, kind), mask=inside)
    if GATED:
        tl.store(d_hidden + at + n, narrow(d_active * by_up, kind), mask=inside)
    at = active + row[:, None] * n + columns[None, :]
    tl.store(at, narrow(value * share[:, None], kind), mask=inside)
    return sums


@triton.jit
def _times_bias(
    grad, bias, source, first, expert, d, stride, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, ROWS_TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Each row of grad times its expert's bias [E, d] -> [BLOCK_M]."""
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for k in tl.range(0, d, BLOCK_K):
        step = load_rows(grad, source, first, k, d, stride, BLOCK_K, ROWS_TMA, EVEN)
        column = k + tl.arange(0, BLOCK_K)
        at = bias + expert.to(tl.int64) * d + column
        part = tl.load(at, mask=column < d, other=0.0).to(tl.float32)
        sums += tl.sum(step.to(tl.float32) * part[None, :], 1)
    return sums


@triton.jit
def hidden_gradient_kernel(
    grad, order, weights, tiles, ends, down, bias, hidden, d_hidden, active, shares,
    d, n, rows, row_tiles, stride_x, stride_e, stride_r, stride_c,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,
    ALPHA: tl.constexpr, ROWS_TMA: tl.constexpr, FORM: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of d_hidden [N, 2n or n], of active [N, n] and of shares [tiles, N].

    Row i of grad belongs to token order[i] // K, or to row i if K is 0.
    """
    tile, block = swizzle(tl.program_id(0), row_tiles, tl.cdiv(n, BLOCK_N), GROUP)
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    first = tl.load(tiles + row_tiles + tile)
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < tl.load(ends + expert)
    row = row.to(tl.int64)
    choice = row
    if order is not None:
        choice = tl.load(order + row, mask=is_row, other=0)
    source = tl.where(is_row, row, 0)
    if K > 0:
        # Rows beyond the tile read token 0 and are not stored.
        source = (choice.to(tl.int32) // K).to(tl.int64)
    start = block * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, d, BLOCK_K):
        a = load_rows(grad, source, first, k, d, stride_x, BLOCK_K, ROWS_TMA, EVEN)
        b = load_weight(
            down, expert, start, k, n, d, n, stride_e, stride_r, stride_c, BLOCK_N,
            BLOCK_K, FORM, EVEN,
        )  # fmt: skip
        acc = dot(a, b, acc, PRECISION)
    share = tl.full((BLOCK_M,), 1.0, tl.float32)
    if weights is not None:
        share = tl.load(weights + choice, mask=is_row, other=0.0).to(tl.float32)
    # In parts, so that the values of one at a time stand in registers.
    parts = column_parts(acc, SUB)
    size: tl.constexpr = BLOCK_N // SUB
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(SUB):
        sums += _finish(
            parts[part], hidden, d_hidden, active, row, is_row, start + part * size, n,
            share, GATED, ACTIVATION, LIMIT, ALPHA,
        )  # fmt: skip
    if shares is not None:
        if bias is not None:  # noqa: SIM102
            if block == 0:
                sums += _times_bias(
                    grad, bias, source, first, expert, d, stride_x, BLOCK_M, BLOCK_K,
                    ROWS_TMA, EVEN,
                )  # fmt: skip
        tl.store(shares + block.to(tl.int64) * rows + row, sums, mask=is_row)


@triton.jit
def sum_shares_kernel(shares, order, last, out, rows, parts, BLOCK: tl.constexpr):
    """Sums over the parts of shares [parts, N] at out[order]; 0 for rows of no expert."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < tl.load(last)
    total = tl.zeros((BLOCK,), tl.float32)
    at = shares + row
    for _ in range(parts):
        total += tl.load(at, mask=is_row, other=0.0)
        at += rows
    choice = row
    if order is not None:
        choice = tl.load(order + row, mask=row < rows, other=0)
    tl.store(out + choice, narrow(total, out.dtype.element_ty), mask=row < rows)


def _sum_shares(
    shares: Tensor, order: Tensor | None, ends: Tensor, weights: Tensor
) -> Tensor:
    """The gradient of weights [T, K] from its parts [parts, N] by row."""
    parts, rows = shares.shape
    out = weights.new_empty(weights.shape)
    grid = (triton.cdiv(rows, 256),)
    sum_shares_kernel[grid](shares, order, ends[-1:], out, rows, parts, BLOCK=256)
    return out


def hidden_gradient(
    grad: Tensor,
    order: Tensor | None,
    k: int,
    weights: Tensor | None,
    ends: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    hidden: Tensor,
    activation: str,
    settings: dict[str, Any],
    wants_weights: bool,
    permuted: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of hidden [N, 2n or n] and of weights [T, K], and scaled values [N, n].

    grad is that of tokens [T, d], of which row i takes order[i] // k; or of rows [N, d]
    if they are permuted already or there is no order. down is [E, d, n], down_bias
    [E, d]; weights stand by choice if there is an order and by row if not, and are 1 if
    None. Rows of no expert are not written, and their weights get 0.
    """
    settings = constants(activation, settings)
    check_formats(grad, down, hidden)
    (rows, width), (experts, d, n) = hidden.shape, down.shape
    d_hidden, active = hidden.new_empty(rows, width), hidden.new_empty(rows, n)
    learnt = weights if wants_weights else None
    if rows == 0 or n == 0:
        return d_hidden, active, None if learnt is None else torch.zeros_like(learnt)
    grad = grad.contiguous()
    gathered = order is not None and not permuted
    weight = down.transpose(1, 2)
    tile = choose("hidden_gradient", rows, experts, d, n, grad.dtype, grad.device)
    tiles = tile_table(ends, rows, tile.m)
    source, rows_tma = (grad, False) if gathered else describe_rows(grad, tile)
    matrix, form = describe_weight(weight, tile)
    blocks = triton.cdiv(n, tile.n)
    shares = None
    if learnt is not None:
        shares = ends.new_empty(blocks, rows, dtype=torch.float32)
    hidden_gradient_kernel[(tiles.shape[1] * blocks,)](
        source, order, None if weights is None else weights.contiguous(), tiles, ends,
        matrix, None if down_bias is None else down_bias.contiguous(),
        hidden.contiguous(), d_hidden, active, shares, d, n, rows, tiles.shape[1],
        grad.stride(0), *weight.stride(), K=k if gathered else 0, BLOCK_M=tile.m,
        BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=tile.group, SUB=tile.sub, **settings,
        ROWS_TMA=rows_tma, FORM=form, EVEN=d % tile.k == 0, PRECISION=precision(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if learnt is None or shares is None:
        return d_hidden, active, None
    return d_hidden, active, _sum_shares(shares, order, ends, learnt)
