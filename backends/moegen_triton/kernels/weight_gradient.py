"""Gradients of experts' matrices: outer products of rows, summed within each expert.

The sum runs over rows, so a gathered operand is gathered along it. Rows of other experts
never take part: whatever stands in them, NaN too, becomes zero before the product.
"""

from typing import Any, Literal

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import can_describe, check_formats, dot, has_tma, narrow, precision
from .matrices import swizzle
from .tiles import Tile, choose


@triton.jit
def _load_step(
    x, order, row, column, end, width, K: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tile [ROWS, COLUMNS] of x from `row` on; zeros from `end` on and beyond `width`.

    Row i is row order[i] // K of x, or row i if K is 0. Descriptors know no expert's
    end: what they read from there on becomes zero only if MASKED. TURNED gives the
    transpose, which before Hopper must not come from a tile or it would not be
    fetched ahead.
    """
    rows = row + tl.arange(0, ROWS)
    is_row = rows < end
    if TMA:
        tile = x.load([row, column])
        if MASKED:
            tile = tl.where(is_row[:, None], tile, 0.0)
        if TURNED:
            tile = tl.trans(tile)
    else:
        if K > 0:
            rows = tl.load(order + rows, mask=is_row, other=0).to(tl.int32) // K
        at = rows.to(tl.int64) * width
        columns = column + tl.arange(0, COLUMNS)
        if TURNED:
            inside = (columns < width)[:, None] & is_row[None, :]
            tile = tl.load(x + at[None, :] + columns[:, None], mask=inside, other=0.0)
        else:
            inside = is_row[:, None] & (columns < width)[None, :]
            tile = tl.load(x + at[:, None] + columns[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _add_step(
    acc, left, right, order, row, top, edge, end, m, r, LEFT_K: tl.constexpr,
    RIGHT_K: tl.constexpr, LEFT_TMA: tl.constexpr, RIGHT_TMA: tl.constexpr,
    MASKED: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + the products of ROWS rows from `row` on, left's from column `top` on."""
    a = _load_step(
        left,
        order,
        row,
        top,
        end,
        m,
        LEFT_K,
        LEFT_TMA,
        MASKED,
        True,
        ROWS,
        acc.shape[0],
    )
    b = _load_step(
        right,
        order,
        row,
        edge,
        end,
        r,
        RIGHT_K,
        RIGHT_TMA,
        MASKED,
        False,
        ROWS,
        acc.shape[1],
    )
    return dot(a, b, acc, PRECISION)


@triton.jit
def _store_row_sum(
    out, x, order, row_weights, expert, column, start, end, width, K: tl.constexpr,
    TMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum of an expert's rows of x, each times its weight, into out [E, width]."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for row in tl.range(start, end, ROWS):
        step = _load_step(
            x, order, row, column, end, width, K, TMA, True, False, ROWS, COLUMNS
        )
        step = step.to(tl.float32)
        if row_weights is not None:
            choice = row + tl.arange(0, ROWS)
            inside = choice < end
            if order is not None:
                choice = tl.load(order + choice, mask=inside, other=0)
            weight = tl.load(row_weights + choice, mask=inside, other=0.0)
            step *= weight.to(tl.float32)[:, None]
        total += tl.sum(step, 0)
    columns = column + tl.arange(0, COLUMNS)
    value = narrow(total, out.dtype.element_ty)
    tl.store(out + expert.to(tl.int64) * width + columns, value, mask=columns < width)


@triton.jit
def _span(ends, expert):
    """Where an expert's rows start and end."""
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    return start, tl.load(ends + expert)


@triton.jit
def weight_gradient_kernel(
    left, right, order, row_weights, ends, out, bias, m, r, LEFT_K: tl.constexpr,
    RIGHT_K: tl.constexpr, LEFT_TMA: tl.constexpr, RIGHT_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """One tile of an expert's matrix in out [E, m, r], and of its bias [E, m].

    All tiles of an expert follow one another, so that its rows stay in L2.
    """
    tiles_m, tiles_r = tl.cdiv(m, BLOCK_M), tl.cdiv(r, BLOCK_N)
    expert = tl.program_id(0) // (tiles_m * tiles_r)
    tile_m, tile_r = swizzle(
        tl.program_id(0) % (tiles_m * tiles_r), tiles_m, tiles_r, GROUP
    )
    top, edge = tile_m * BLOCK_M, tile_r * BLOCK_N
    start, end = _span(ends, expert)
    # Rows that fill no whole step come last where descriptors read beyond them.
    whole = end
    if LEFT_TMA or RIGHT_TMA:
        whole = start + (end - start) // BLOCK_K * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in tl.range(start, whole, BLOCK_K, warp_specialize=SPECIALIZED):
        acc = _add_step(
            acc, left, right, order, row, top, edge, end, m, r, LEFT_K, RIGHT_K,
            LEFT_TMA, RIGHT_TMA, False, BLOCK_K, PRECISION,
        )  # fmt: skip
    if LEFT_TMA or RIGHT_TMA:  # noqa: SIM102
        # Loops with warps of their own bear no branch beside them.
        if SPECIALIZED or whole < end:
            acc = _add_step(
                acc, left, right, order, whole, top, edge, end, m, r, LEFT_K, RIGHT_K,
                LEFT_TMA, RIGHT_TMA, True, BLOCK_K, PRECISION,
            )  # fmt: skip
    rows, columns = top + tl.arange(0, BLOCK_M), edge + tl.arange(0, BLOCK_N)
    at = out + (expert.to(tl.int64) * m + rows)[:, None] * r + columns[None, :]
    inside = (rows < m)[:, None] & (columns < r)[None, :]
    tl.store(at, narrow(acc, out.dtype.element_ty), mask=inside)
    if bias is not None:  # noqa: SIM102
        if tile_r == 0:
            _store_row_sum(
                bias, left, order, row_weights, expert, top, start, end, m, LEFT_K,
                LEFT_TMA, BLOCK_K, BLOCK_M,
            )  # fmt: skip


@triton.jit
def bias_gradient_kernel(
    x, ends, out, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The sums of each expert's rows of x [N, width] into out [E, width]."""
    expert, column = tl.program_id(0), tl.program_id(1) * BLOCK_N
    start, end = _span(ends, expert)
    _store_row_sum(
        out, x, None, None, expert, column, start, end, width, 0, False, BLOCK_M,
        BLOCK_N,
    )  # fmt: skip


def _describe(x: Tensor, tile: Tile, width: int, gathered: bool) -> tuple[Any, bool]:
    """x for the kernel: under a descriptor if the tile asks and memory allows."""
    asked = tile.rows_tma and not gathered
    if not (asked and has_tma(x.device) and can_describe(x)):
        return x, False
    return TensorDescriptor.from_tensor(x, [tile.k, width]), True


def weight_gradient(
    left: Tensor,
    right: Tensor,
    order: Tensor | None,
    k: int,
    gathered: Literal["left", "right", "none"],
    ends: Tensor,
    row_weights: Tensor | None = None,
    bias: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Sums over each expert's rows of left row times right row -> [E, m, r].

    left is [N, m] and right [N, r]; the gathered one has tokens [T, .], of which row i
    is order[i] // k. With a bias also the sums of left rows [E, m], each times its
    row_weights [T, K], which stand by choice if there is an order and by row if not.
    """
    check_formats(left, right)
    left, right = left.contiguous(), right.contiguous()
    rows = len(left) if order is None else len(order)
    experts, m, r = len(ends), left.shape[1], right.shape[1]
    out = left.new_empty(experts, m, r)
    out_bias = left.new_empty(experts, m) if bias else None
    if rows == 0 or out.numel() == 0:
        return out.zero_(), out_bias if out_bias is None else out_bias.zero_()
    tile = choose("weight_gradient", rows, experts, m, r, left.dtype, left.device)
    left_x, left_tma = _describe(left, tile, tile.m, gathered == "left")
    right_x, right_tma = _describe(right, tile, tile.n, gathered == "right")
    # Rows that wait for their numbers are under way for half of the stages only.
    stages = tile.stages if gathered == "none" else 2 * tile.stages - 1
    grid = (experts * triton.cdiv(m, tile.m) * triton.cdiv(r, tile.n),)
    weight_gradient_kernel[grid](
        left_x, right_x, order,
        None if row_weights is None else row_weights.contiguous(), ends, out, out_bias,
        m, r, LEFT_K=k if gathered == "left" else 0,
        RIGHT_K=k if gathered == "right" else 0, LEFT_TMA=left_tma,
        RIGHT_TMA=right_tma, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        GROUP=tile.group, PRECISION=precision(),
        SPECIALIZED=tile.specialized and left_tma and right_tma and not bias,
        num_warps=tile.warps, num_stages=stages,
    )  # fmt: skip
    return out, out_bias


def bias_gradient(rows: Tensor, ends: Tensor) -> Tensor:
    """The sums of each expert's rows [N, m] -> [E, m]."""
    check_formats(rows)
    out = rows.new_empty(len(ends), rows.shape[1])
    if rows.numel() == 0:
        return out.zero_()
    grid = (len(ends), triton.cdiv(rows.shape[1], 64))
    bias_gradient_kernel[grid](
        rows.contiguous(), ends, out, rows.shape[1], BLOCK_M=32, BLOCK_N=64
    )
    return out
