"""Which tile each kernel works in: as measured on this GPU, else by the cost model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from .candidates import INTERPRETED, KERNELS, TILES, TILES_FP32, TILES_ODD, Tile
from .chips import Chip, chip_of, generation
from .costs import permutes, seconds, work_of
from .device import INTERPRET
from .measured import Measured, read

__all__ = [
    "KERNELS",
    "Prediction",
    "Tile",
    "candidates",
    "choose",
    "choose_for",
    "permutes",
    "pinned",
    "predict",
]

#: Where `moegen tune` leaves what it measured: beside this file.
MEASURED = Path(__file__).with_name("tiles.json")

_pinned: dict[str, Tile] = {}


@contextmanager
def pinned(**tiles: Tile) -> Iterator[None]:
    """Let kernels, by name, work in given tiles, whatever would be chosen."""
    before = dict(_pinned)
    _pinned.update(tiles)
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)


def choose(
    kernel: str,
    rows: int,
    experts: int,
    d: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    sums: int = 0,
) -> Tile:
    """Return the tile of a kernel for ``rows`` rows over ``experts`` experts.

    ``d`` is the model's width and ``n`` the experts'. Of a matrix that is not part of
    a feed-forward, ``down`` takes its columns as ``d`` and its sum's length as ``n``;
    ``weight_gradient`` takes [d, n]. ``sums`` is how many products a hidden number
    comes of: 2 with a gate, which ``up`` is taken to have, and 1 without. Nothing
    waits for the device.
    """
    if kernel in _pinned:
        return _pinned[kernel]
    if INTERPRET or device.type != "cuda":
        return INTERPRETED
    return _chosen(kernel, rows, experts, d, n, dtype, device, sums)


@lru_cache(maxsize=4096)
def _chosen(
    kernel: str,
    rows: int,
    experts: int,
    d: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    sums: int,
) -> Tile:
    chip = chip_of(device)
    table = _measured(chip.name)
    found = table and table.find(kernel, rows, experts, d, n, _name(dtype))
    if found:
        return found
    return choose_for(chip, kernel, rows, experts, d, n, dtype, sums)


@lru_cache
def _measured(device: str) -> Measured | None:
    """Return what was measured on this device, if it was."""
    if not MEASURED.exists():
        return None
    table = read(MEASURED)
    if table.device == device:
        return table
    warnings.warn(
        f"{MEASURED} was measured on {table.device}, and this is {device}: tiles are "
        "chosen by the cost model",
        stacklevel=2,
    )
    return None


def candidates(
    chip: Chip, kernel: str, d: int, n: int, dtype: torch.dtype
) -> tuple[Tile, ...]:
    """Return the tiles that a kernel is offered on a chip."""
    if d % 16 or n % 16:
        return TILES_ODD[kernel]
    if dtype == torch.float32:
        return TILES_FP32[kernel]
    return TILES[generation(chip.capability)][kernel]


@lru_cache(maxsize=4096)
def choose_for(
    chip: Chip,
    kernel: str,
    rows: int,
    experts: int,
    d: int,
    n: int,
    dtype: torch.dtype,
    sums: int = 0,
) -> Tile:
    """Return the tile that the cost model takes to be the fastest on a chip."""
    sums = _sums(kernel, sums)
    work = work_of(kernel, rows, experts, d, n, sums)
    size = dtype.itemsize

    def cost(tile: Tile) -> float:
        return seconds(kernel, tile, work, size, chip)

    return min(candidates(chip, kernel, d, n, dtype), key=cost)


def _sums(kernel: str, sums: int) -> int:
    return sums or (2 if kernel == "up" else 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Prediction(NamedTuple):
    """Seconds of the kernels of a layer's routed experts, by what they do."""

    forward: dict[str, float]
    backward: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of all kernels together."""
        return math.fsum(self.forward.values()) + math.fsum(self.backward.values())


def predict(
    chip: Chip,
    tokens: int,
    choices: int,
    experts: int,
    d: int,
    n: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    gated: bool = True,
    training: bool = True,
) -> Prediction:
    """Return how long the experts of a layer take, by the cost model.

    Tokens are taken to fall on experts by chance, and the router is not counted.
    """
    rows, sums, size = tokens * choices, 1 + gated, dtype.itemsize

    def time(kernel: str, d: int, n: int, sums: int = 1, choices: int = 1) -> float:
        tile = choose_for(chip, kernel, rows, experts, d, n, dtype, sums)
        work = work_of(kernel, rows, experts, d, n, sums, choices, training)
        return seconds(kernel, tile, work, size, chip)

    copied = (rows + tokens) * d * size / chip.bandwidth + chip.launch
    forward = {
        "order": 4 * chip.launch + 40 * rows / chip.bandwidth,
        "up": time("up", d, n, sums, choices),
        "down": time("down", d, n),
        "combine": copied,
    }
    if not training:
        return Prediction(forward, {})
    backward = {
        "hidden_gradient": time("hidden_gradient", d, n, sums, choices),
        "down_weight_gradient": time("weight_gradient", d, n),
        "input_gradient": time("input_gradient", d, sums * n),
        "combine": copied,
        "up_weight_gradient": time("weight_gradient", sums * n, d),
    }
    return Prediction(forward, backward)
