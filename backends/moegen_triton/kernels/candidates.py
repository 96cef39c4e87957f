"""The tiles that kernels are offered on each generation of chips: plain data.

Each row is compiled ahead of time by the tests of moegen, which refuse one that spills
registers, misses the tensor cores or asks for more shared memory than there is.
"""

from __future__ import annotations

from typing import NamedTuple


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


def _tma(m: int, n: int, k: int, warps: int, stages: int, sub: int = 1) -> Tile:
    """Return a tile that reads whatever is contiguous by TMA."""
    return Tile(m, n, k, warps, stages, sub=sub, weights_tma=True, rows_tma=True)


KERNELS = ("up", "down", "hidden_gradient", "input_gradient", "weight_gradient")

#: Tiles of the interpreter: small, since its tests are.
INTERPRETED = Tile(16, 16, 16, warps=1, stages=1, sub=2)

#: Tiles of 16-bit numbers on chips whose tensor cores take registers alone. They fit the
#: shared memory of the smaller ones.
_SMALL: dict[str, tuple[Tile, ...]] = {
    "up": (
        Tile(16, 64, 64, 4, 4),
        Tile(64, 64, 64, 4, 3, sub=2),
        Tile(128, 64, 64, 8, 3, sub=2),
    ),
    "down": (
        Tile(16, 128, 64, 4, 3),
        Tile(64, 128, 32, 4, 4),
        Tile(128, 128, 32, 8, 4),
        Tile(128, 256, 32, 8, 3),
    ),
    "hidden_gradient": (
        Tile(16, 64, 64, 4, 3),
        Tile(64, 64, 64, 4, 3, sub=2),
        Tile(128, 128, 32, 8, 4, sub=4),
    ),
    "input_gradient": (
        Tile(16, 128, 64, 4, 3),
        Tile(64, 128, 32, 4, 4),
        Tile(128, 128, 32, 8, 4),
        Tile(128, 256, 32, 8, 3),
    ),
    "weight_gradient": (
        Tile(64, 64, 64, 4, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 256, 32, 8, 3),
    ),
}

#: By generation and kernel, tiles of 16-bit numbers.
TILES: dict[int, dict[str, tuple[Tile, ...]]] = {
    80: _SMALL,
    89: _SMALL,
    120: _SMALL,
    90: {
        "up": (
            _tma(16, 64, 128, 4, 4),
            _tma(64, 64, 64, 4, 4, 2),
            _tma(128, 64, 64, 8, 3, 2),
            _tma(128, 128, 64, 8, 4, 4),
        ),
        "down": (
            _tma(16, 128, 64, 4, 4),
            _tma(64, 128, 64, 4, 4),
            _tma(128, 128, 64, 8, 3),
            _tma(128, 256, 64, 8, 4),
        ),
        "hidden_gradient": (
            _tma(16, 64, 128, 4, 4),
            _tma(64, 128, 64, 8, 4, 4),
            _tma(128, 128, 64, 8, 4, 4),
        ),
        "input_gradient": (
            _tma(16, 128, 64, 4, 4),
            _tma(64, 128, 64, 4, 4),
            _tma(128, 128, 64, 8, 3),
            _tma(128, 256, 64, 8, 4),
        ),
        "weight_gradient": (
            _tma(64, 128, 64, 4, 3),
            _tma(128, 128, 64, 8, 3),
            _tma(128, 256, 64, 8, 4),
        ),
    },
}
TILES[100] = TILES[90]

#: Tiles of float32, on every chip.
TILES_FP32: dict[str, tuple[Tile, ...]] = {
    "up": (Tile(16, 32, 32, 4, 2), Tile(64, 32, 32, 8, 2)),
    "down": (Tile(16, 32, 32, 4, 2), Tile(64, 64, 32, 8, 2)),
    "hidden_gradient": (
        Tile(16, 32, 32, 4, 2),
        Tile(64, 64, 32, 8, 2, sub=2),
    ),
    "input_gradient": (Tile(16, 32, 32, 4, 2), Tile(64, 64, 32, 8, 2)),
    "weight_gradient": (Tile(64, 64, 32, 8, 2),),
}

#: Tiles of widths that 16 does not divide, on every chip: numbers are loaded one by one,
#: which takes registers.
TILES_ODD: dict[str, tuple[Tile, ...]] = {
    "up": (Tile(32, 32, 32, 4, 2),),
    "down": (Tile(32, 32, 32, 4, 2), Tile(64, 64, 32, 8, 1)),
    "hidden_gradient": (Tile(32, 32, 32, 4, 2),),
    "input_gradient": (Tile(32, 32, 32, 4, 2), Tile(64, 64, 32, 8, 1)),
    "weight_gradient": (Tile(64, 32, 32, 8, 2),),
}
