"""How kernels find their tiles, and read rows and matrices by pointers or TMA descriptors."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import can_describe, can_specialize, has_tma
from .dispatch import tile_table

Tables = dict[int, Tensor]


def tiles_of(ends: Tensor, rows: int, block: int, tables: Tables | None) -> Tensor:
    """The table of tiles of `block` rows, made unless it is among `tables` already."""
    if tables is None:
        return tile_table(ends, rows, block)
    if block not in tables:
        tables[block] = tile_table(ends, rows, block)
    return tables[block]


def describe_rows(x: Tensor, tile: Any) -> tuple[Any, bool]:
    """x [N, c] for kernels: under a descriptor if the tile asks and memory allows."""
    if not (tile.rows_tma and has_tma(x.device) and can_describe(x)):
        return x, False
    return TensorDescriptor.from_tensor(x, [tile.m, tile.k]), True


def describe_weight(weight: Tensor, tile: Any) -> tuple[Any, str]:
    """weight [E, r, c] for kernels, and how it lies: "rows", "columns" or "pointers".

    Descriptors see two axes, with the experts' matrices one below the other. What lies
    beyond the last row of one is the next, which does no harm in columns of the result
    that are not stored, but would along the sum: so columns come in whole blocks.
    """
    form, flat = "rows", weight
    if weight.stride(2) != 1 and weight.stride(1) == 1:
        form, flat = "columns", weight.transpose(1, 2)
    stacked = flat.stride(0) == flat.shape[1] * flat.stride(1)
    whole = form == "rows" or weight.shape[2] % tile.k == 0
    allowed = tile.weights_tma and has_tma(weight.device)
    if not (allowed and stacked and whole and can_describe(flat)):
        return weight, "pointers"
    block = [tile.n, tile.k] if form == "rows" else [tile.k, tile.n]
    return TensorDescriptor.from_tensor(flat.flatten(0, 1), block), form


def specializes(tile: Any, rows_tma: bool, form: str, device: torch.device) -> bool:
    """Whether loads get warps of their own: where all are by TMA, if the tile asks."""
    asked = tile.specialized and tile.sub == 1
    return asked and rows_tma and form != "pointers" and can_specialize(device)


@triton.jit
def swizzle(program, num_rows, num_columns, GROUP: tl.constexpr):
    """The tile of a program: GROUP row tiles go over all columns before the next ones.

    So an expert's columns, once read, are in L2 for GROUP row tiles.
    """
    first = program // (GROUP * num_columns) * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    within = program % (GROUP * num_columns)
    return first + within % height, within // height


@triton.jit
def bounds(expert, ends, depth, SPECIALIZED: tl.constexpr):
    """The expert of a tile, where its rows end, and the length of its sums.

    Kernels whose warps are specialized may not return early: a tile of no expert has no
    rows there, and sums of nothing.
    """
    if SPECIALIZED:
        depth = tl.where(expert < 0, 0, depth)
        end = tl.where(expert < 0, 0, tl.load(ends + tl.maximum(expert, 0)))
        expert = tl.maximum(expert, 0)
    else:
        end = tl.load(ends + expert)
    return expert, end, depth


@triton.jit
def load_rows(
    x, source, first, k, columns, stride, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Tile [BLOCK_M, BLOCK_K] of x [N, columns]: rows `source` or those from `first` on."""
    if TMA:
        tile = x.load([first, k])
    else:
        at = k + tl.arange(0, BLOCK_K)
        pointers = x + source[:, None] * stride + at[None, :]
        if EVEN:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=at[None, :] < columns, other=0.0)
    return tile


@triton.jit
def load_weight(
    w, expert, row, k, rows, columns, last, stride_e, stride_r, stride_c,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FORM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tile [BLOCK_K, BLOCK_N] of an expert's matrix turned: (k, r) is w[expert, r, k].

    w is [E, rows, columns]; rows from `last` on may hold anything.
    """
    if FORM == "rows":
        tile = tl.trans(w.load([expert * rows + row, k]))
    elif FORM == "columns":
        tile = w.load([expert * columns + k, row])
    else:
        r = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        c = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        base = w + expert.to(tl.int64) * stride_e
        pointers = base + r[None, :] * stride_r + c[:, None] * stride_c
        if EVEN:
            tile = tl.load(pointers, mask=r[None, :] < last, other=0.0)
        else:
            inside = (r[None, :] < last) & (c[:, None] < columns)
            tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def _halves(x):
    """x [m, n] as its left and right [m, n / 2]."""
    return tl.split(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)).permute(0, 2, 1))


@triton.jit
def column_parts(x, PARTS: tl.constexpr):
    """x [m, n] as a tuple of PARTS, 1, 2 or 4, tiles from left to right."""
    tl.static_assert(PARTS == 1 or PARTS == 2 or PARTS == 4)
    if PARTS == 4:
        left, right = _halves(x)
        parts = _halves(left) + _halves(right)
    elif PARTS == 2:
        parts = _halves(x)
    else:
        parts = (x,)
    return parts
