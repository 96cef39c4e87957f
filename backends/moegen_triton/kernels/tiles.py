"""Which tile each kernel works in, by kernel, shape, number type and chip."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What one program of a kernel works on, and with what.

    Matrices of rows (up, down, hidden_gradient, input_gradient): ``m`` rows times
    ``n`` columns of the result (of each of gate and up, where there are both), in
    steps of ``k`` along the sum. weight_gradient: ``m`` times ``n`` entries of an
    expert's matrix, in steps of ``k`` rows.
    """

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3
    #: Row tiles that are walked together before the next column tile, for L2.
    group: int = 8
    #: Column parts that the epilogue is split in, so that its values fit registers.
    sub: int = 1
    #: Whether weights come by TMA descriptors, where alignment allows.
    weights_tma: bool = False
    #: Whether rows come by TMA descriptors, where they are contiguous.
    rows_tma: bool = False
    #: Whether loads and products run in warps of their own.
    specialized: bool = False


KERNELS = ("up", "down", "hidden_gradient", "input_gradient", "weight_gradient")

#: Tiles of the interpreter: small, since its tests are.
INTERPRETED = Tile(16, 16, 16, warps=1, stages=1, sub=2)


@lru_cache(maxsize=4096)
def choose(
    kernel: str,
    rows: int,
    experts: int,
    d: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tile:
    """Return the tile of a kernel for ``rows`` rows over ``experts`` experts.

    ``d`` is the model's width and ``n`` the experts'. Of a matrix that is not part of
    a feed-forward, ``down`` takes its columns as ``d`` and its sum's length as ``n``;
    ``weight_gradient`` takes [d, n]. Nothing waits for the device.
    """
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETED
    if dtype == torch.float32:
        return Tile(64, 64, 32, warps=4, stages=2, sub=2)
    if kernel == "weight_gradient":
        return Tile(128, 128, 64, warps=8, stages=3)
    m = 128
    while m > 16 and m * experts > 2 * rows:
        m //= 2
    width = 64 if kernel == "up" else 128
    sub = 4 if kernel == "hidden_gradient" else 1
    return Tile(m, width, 64, warps=8 if m == 128 else 4, stages=3, sub=sub)
