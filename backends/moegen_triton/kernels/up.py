"""Up-projections of routed experts: gather, product, bias and activation in one kernel."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, constants
from .device import dot, narrow, precision
from .matrices import (
    Tables,
    bounds,
    column_parts,
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
def _finish(
    gate, up, bias, hidden, activated, row, is_row, expert, column, n,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,
    ALPHA: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Bias, activation and stores for columns `column` of a tile."""
    parts: tl.constexpr = 2 if GATED else 1
    is_column = column < n
    inside = is_row[:, None] & is_column[None, :]
    if bias is not None:
        at = bias + expert.to(tl.int64) * (parts * n) + column
        gate += tl.load(at, mask=is_column, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(at + n, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if SAVE:
        at = hidden + row[:, None] * (parts * n) + column[None, :]
        tl.store(at, narrow(gate, hidden.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(at + n, narrow(up, hidden.dtype.element_ty), mask=inside)
    y = activate(gate, up, GATED, ACTIVATION, LIMIT, ALPHA)
    at = activated + row[:, None] * n + column[None, :]
    tl.store(at, narrow(y, activated.dtype.element_ty), mask=inside)


@triton.jit
def up_kernel(
    x, order, weight, bias, tiles, ends, hidden, activated,
    d, n, row_tiles, stride_x, stride_e, stride_r, stride_c,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    ROWS_TMA: tl.constexpr, FORM: tl.constexpr, SAVE: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """One tile of hidden [N, 2n or n] (if SAVE) and of activated [N, n].

    x is tokens [T, d] where there is an order, else rows [N, d].
    """
    tile, block = swizzle(tl.program_id(0), row_tiles, tl.cdiv(n, BLOCK_N), GROUP)
    expert = tl.load(tiles + tile)
    if not SPECIALIZED:  # noqa: SIM102
        if expert < 0:
            return
    expert, end, length = bounds(expert, ends, d, SPECIALIZED)
    first = tl.load(tiles + row_tiles + tile)
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < end
    row = row.to(tl.int64)
    source = row
    if order is not None:
        # Rows beyond the tile read token 0 and are not stored.
        source = tl.load(order + row, mask=is_row, other=0).to(tl.int32) // K
        source = source.to(tl.int64)
    elif not ROWS_TMA:
        source = tl.where(is_row, row, 0)
    start = block * BLOCK_N
    parts: tl.constexpr = 2 if GATED else 1
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = gate
    for k in tl.range(0, length, BLOCK_K, warp_specialize=SPECIALIZED):
        a = load_rows(x, source, first, k, d, stride_x, BLOCK_K, ROWS_TMA, EVEN)
        b = load_weight(
            weight, expert, start, k, parts * n, d, n, stride_e, stride_r, stride_c,
            BLOCK_N, BLOCK_K, FORM, EVEN,
        )  # fmt: skip
        gate = dot(a, b, gate, PRECISION)
        if GATED:
            b = load_weight(
                weight, expert, n + start, k, 2 * n, d, 2 * n, stride_e, stride_r,
                stride_c, BLOCK_N, BLOCK_K, FORM, EVEN,
            )  # fmt: skip
            up = dot(a, b, up, PRECISION)
    # In parts, so that the values of one at a time stand in registers.
    gates = column_parts(gate, SUB)
    ups = column_parts(up, SUB)
    size: tl.constexpr = BLOCK_N // SUB
    for part in tl.static_range(SUB):
        _finish(
            gates[part], ups[part], bias, hidden, activated, row, is_row, expert,
            start + part * size + tl.arange(0, size), n,
            GATED, ACTIVATION, LIMIT, ALPHA, SAVE,
        )  # fmt: skip


def up(
    x: Tensor,
    order: Tensor | None,
    k: int,
    weight: Tensor,
    bias: Tensor | None,
    ends: Tensor,
    activation: str,
    settings: dict[str, Any],
    save: bool,
    tables: Tables | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The hidden values of all rows: hidden [N, 2n or n] if saved, activated [N, n].

    x is tokens [T, d], of which row i takes order[i] // k, or rows [N, d] without an
    order; weight [E, 2n or n, d], bias [E, 2n or n]. Rows of no expert are not written.
    Tables of tiles of these ends are kept in `tables` for the next kernel.
    """
    settings = constants(activation, settings)
    rows, d = x.shape[0] if order is None else order.shape[0], x.shape[1]
    experts, width = weight.shape[:2]
    n = width // 2 if settings["GATED"] else width
    hidden = x.new_empty(rows, width) if save else None
    activated = x.new_empty(rows, n)
    if rows == 0 or n == 0:
        return hidden, activated
    x = x if x.stride(1) == 1 else x.contiguous()
    sums = width // n
    tile = choose("up", rows, experts, d, n, x.dtype, x.device, sums)
    tiles = tiles_of(ends, rows, tile.m, tables)
    source, rows_tma = describe_rows(x, tile) if order is None else (x, False)
    matrix, form = describe_weight(weight, tile)
    grid = (tiles.shape[1] * triton.cdiv(n, tile.n),)
    up_kernel[grid](
        source, order, matrix, None if bias is None else bias.contiguous(),
        tiles, ends, hidden, activated, d, n, tiles.shape[1], x.stride(0),
        *weight.stride(), K=k, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        GROUP=tile.group, SUB=tile.sub, **settings, ROWS_TMA=rows_tma, FORM=form, SAVE=save,
        EVEN=d % tile.k == 0, PRECISION=precision(),
        SPECIALIZED=specializes(tile, rows_tma, form, x.device),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return hidden, activated
