"""Rows times their experts' matrices: down-projections, input gradients, plain products."""

import triton
import triton.language as tl
from torch import Tensor

from .device import dot, narrow, precision
from .matrices import (
    Tables,
    bounds,
    describe_rows,
    describe_weight,
    load_rows,
    load_weight,
    specializes,
    swizzle,
    tiles_of,
)
from .tiles import choose


@triton.jit
def down_kernel(
    x, weight, bias, tiles, ends, out,
    width, depth, row_tiles, stride_x, stride_e, stride_r, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, ROWS_TMA: tl.constexpr, FORM: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """One tile of out [N, width] from x [N, depth] and weight [E, width, depth]."""
    tile, block = swizzle(tl.program_id(0), row_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    expert = tl.load(tiles + tile)
    if not SPECIALIZED:  # noqa: SIM102
        if expert < 0:
            return
    expert, end, length = bounds(expert, ends, depth, SPECIALIZED)
    first = tl.load(tiles + row_tiles + tile)
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < end
    row = row.to(tl.int64)
    source = tl.where(is_row, row, 0)
    start = block * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, length, BLOCK_K, warp_specialize=SPECIALIZED):
        a = load_rows(x, source, first, k, depth, stride_x, BLOCK_K, ROWS_TMA, EVEN)
        b = load_weight(
            weight, expert, start, k, width, depth, width, stride_e, stride_r,
            stride_c, BLOCK_N, BLOCK_K, FORM, EVEN,
        )  # fmt: skip
        acc = dot(a, b, acc, PRECISION)
    column = start + tl.arange(0, BLOCK_N)
    if bias is not None:
        at = bias + expert.to(tl.int64) * width + column
        acc += tl.load(at, mask=column < width, other=0.0).to(tl.float32)[None, :]
    pointers = out + row[:, None] * width + column[None, :]
    inside = is_row[:, None] & (column < width)[None, :]
    tl.store(pointers, narrow(acc, out.dtype.element_ty), mask=inside)


@triton.jit
def zero_tail_kernel(
    out, last, rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Zeros for the rows of out [rows, width] that belong to no expert."""
    first = tl.program_id(0) * BLOCK_M
    end = tl.load(last)
    if first + BLOCK_M <= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = ((row >= end) & (row < rows))[:, None] & (column < width)[None, :]
    pointers = out + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(pointers, tl.zeros((BLOCK_M, BLOCK_N), out.dtype.element_ty), mask=inside)


def zero_tail_(out: Tensor, ends: Tensor) -> Tensor:
    """Zeros, in place, for the rows of out [N, c] that belong to no expert."""
    rows, width = out.shape
    if rows and width:
        grid = (triton.cdiv(rows, 16), triton.cdiv(width, 256))
        zero_tail_kernel[grid](out, ends[-1:], rows, width, BLOCK_M=16, BLOCK_N=256)
    return out


def down(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ends: Tensor,
    transposed: bool = False,
    zero_tail: bool = True,
    tables: Tables | None = None,
) -> Tensor:
    """Multiply each expert's rows by its matrix: rows [N, c] -> [N, out].

    weight is [E, out, c], or [E, c, out] if transposed; bias [E, out]. Rows of no
    expert become zero, or are not written if zero_tail is False. Tables of tiles of these
    ends are kept in `tables` for the next kernel.
    """
    weight = weight.transpose(1, 2) if transposed else weight
    (count, depth), (experts, width) = rows.shape, weight.shape[:2]
    out = rows.new_empty(count, width)
    if count == 0 or width == 0:
        return out
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    name = "input_gradient" if transposed else "down"
    tile = choose(name, count, experts, width, depth, rows.dtype, rows.device)
    tiles = tiles_of(ends, count, tile.m, tables)
    source, rows_tma = describe_rows(rows, tile)
    matrix, form = describe_weight(weight, tile)
    grid = (tiles.shape[1] * triton.cdiv(width, tile.n),)
    down_kernel[grid](
        source, matrix, None if bias is None else bias.contiguous(), tiles, ends, out,
        width, depth, tiles.shape[1], rows.stride(0), *weight.stride(),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=tile.group,
        ROWS_TMA=rows_tma, FORM=form, EVEN=depth % tile.k == 0, PRECISION=precision(),
        SPECIALIZED=specializes(tile, rows_tma, form, rows.device),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return zero_tail_(out, ends) if zero_tail else out
