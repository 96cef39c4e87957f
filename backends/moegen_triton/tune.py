"""Measure the kernels' tiles on this GPU, and write down the fastest."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import triton
from rich.progress import Progress

from moegen_triton.kernels.chips import Chip, chip_of
from moegen_triton.kernels.costs import seconds, work_of
from moegen_triton.kernels.measured import Measured, Row, read, text
from moegen_triton.kernels.tiles import KERNELS, MEASURED, Tile, candidates, pinned
from moegen_triton.launches import LAUNCHES, Launch, Layer

#: How each kernel is launched where it is timed, as what, and with which sizes d and n.
TIMED: dict[str, tuple[tuple[str, Callable[[Layer], tuple[int, int]]], ...]] = {
    "up": (("gathered", lambda x: (x.d, x.n)),),
    "down": (("rows", lambda x: (x.d, x.n)),),
    "hidden_gradient": (("gathered", lambda x: (x.d, x.n)),),
    "input_gradient": (("rows", lambda x: (x.d, x.width)),),
    "weight_gradient": (
        ("left", lambda x: (x.d, x.n)),
        ("right", lambda x: (x.width, x.d)),
    ),
}
#: How often the fastest tile so far is varied.
ROUNDS = 2
#: Runs that are timed, after as many that are not.
RUNS = 20


class NoGpuError(RuntimeError):
    """There is no GPU to measure on."""


def tune(
    layers: Iterable[Layer], out: Path = MEASURED, progress: Progress | None = None
) -> Measured:
    """Measure all tiles at layers' sizes and write the fastest to ``out``.

    What ``out`` says of other sizes on the same device stays. It is written whole at the
    end or not at all. Without a GPU this is a NoGpuError.
    """
    if not torch.cuda.is_available():
        raise NoGpuError("moegen tune measures kernels on a GPU, and torch sees none here")
    device = torch.device("cuda", torch.cuda.current_device())
    chip = chip_of(device)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    jobs = [
        (layer._replace(device=str(device)), kernel, variant, sizes(layer))
        for layer in layers
        for kernel in KERNELS
        for variant, sizes in TIMED[kernel]
    ]
    bar = progress.add_task("Measuring tiles", total=len(jobs)) if progress else None
    found = []
    for layer, kernel, variant, sizes in jobs:
        row = _fastest(layer, kernel, variant, sizes, chip)
        found += [row] if row else []
        if progress is not None and bar is not None:
            progress.advance(bar)
    table = Measured(chip.name, versions, merged(out, chip.name, found))
    write(table, out)
    return table


def merged(out: Path, device: str, rows: list[Row]) -> tuple[Row, ...]:
    """Return new rows after those that ``out`` has of other sizes on the same device."""
    before = read(out) if out.exists() else None
    if before is None or before.device != device:
        return tuple(rows)
    measured = {row[:6] for row in rows}
    return (*(row for row in before.rows if row[:6] not in measured), *rows)


def write(table: Measured, out: Path) -> None:
    """Write a table whole or not at all."""
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=out.name, suffix=".new")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text(table))
        Path(name).chmod(0o644)
        Path(name).replace(out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def variations(tile: Tile) -> Iterator[Tile]:
    """Yield tiles that differ in one way that the shapes of the table leave open."""
    yield tile._replace(weights_tma=not tile.weights_tma)
    yield tile._replace(rows_tma=not tile.rows_tma)
    yield from (tile._replace(group=group) for group in (1, 4, 16) if group != tile.group)
    yield from (tile._replace(stages=s) for s in (tile.stages - 1, tile.stages + 1) if s)
    if tile.weights_tma and tile.rows_tma:
        yield tile._replace(specialized=True, warps=4, sub=1)


def _fastest(
    layer: Layer, kernel: str, variant: str, sizes: tuple[int, int], chip: Chip
) -> Row | None:
    """Measure the table's tiles, and variations of the fastest; None if none runs."""
    launch = LAUNCHES[kernel][variant](layer)
    flush = _larger_than_caches(chip, layer.device)
    offered = candidates(chip, kernel, *sizes, layer.dtype)
    times = {tile: _time(launch, kernel, tile, flush) for tile in offered}
    best = min(times, key=lambda tile: times[tile])
    for _ in range(ROUNDS):
        new = [tile for tile in variations(best) if tile not in times]
        times |= {tile: _time(launch, kernel, tile, flush) for tile in new}
        before, best = best, min(times, key=lambda tile: times[tile])
        if best == before:
            break
    if math.isinf(times[best]):
        return None
    dtype = str(layer.dtype).removeprefix("torch.")
    sums = layer.width // layer.n if kernel == "up" else 1
    gathers = kernel in ("up", "hidden_gradient", "weight_gradient")
    choices = layer.choices if gathers else 1
    work = work_of(kernel, layer.rows, layer.experts, *sizes, sums, choices)
    predicted = seconds(kernel, best, work, layer.dtype.itemsize, chip)
    shape = (layer.rows, layer.experts, *sizes)
    return Row(kernel, dtype, *shape, best, 1e6 * times[best], 1e6 * predicted)


def _larger_than_caches(chip: Chip, device: str) -> torch.Tensor:
    return torch.empty(2 * chip.cache, dtype=torch.int8, device=device)


def _time(launch: Launch, kernel: str, tile: Tile, flush: torch.Tensor) -> float:
    """Return seconds of a launch in a tile, with cold caches; infinite if it fails."""
    try:
        with pinned(**{kernel: tile}):
            return measure(launch, flush)
    except Exception:  # a tile that this chip or this Triton refuses is no candidate
        torch.cuda.synchronize()
        return math.inf


def measure(launch: Launch, flush: torch.Tensor) -> float:
    """Return the median seconds of a launch, replayed from a CUDA graph."""
    launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    found: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for _ in range(2 * RUNS):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        found.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(_milliseconds(*pair) for pair in found[RUNS:]) / 1e3


def _milliseconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(start.elapsed_time(end))
