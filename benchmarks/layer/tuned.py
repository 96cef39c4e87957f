"""Tiles measured on this GPU for the workloads, before they are measured themselves."""

from __future__ import annotations

from rich.progress import Progress

from benchmarks.layer.shapes import Workload
from benchmarks.layer.variants import Absent, module


def tune(works: list[Workload]) -> str:
    """Write the fastest tiles beside the kernels, which use them from then on; says how many."""
    tiles, tuner = module("moegen_triton.kernels.tiles"), module("moegen_triton.tune")
    layer = module("moegen_triton.launches").Layer
    wanted = {
        (work.tokens, work.k, work.experts, work.d, work.n, work.torch_dtype) for work in works
    }
    with Progress() as progress:
        found = tuner.tune([layer(*sizes) for sizes in sorted(wanted, key=str)], progress=progress)
    # What was chosen before, without the measurements.
    tiles._measured.cache_clear()
    tiles._chosen.cache_clear()
    return f"{len(found.rows)} measured tiles for {found.device} in {tiles.MEASURED.name}"


def source_of_tiles() -> str:
    """Whether tiles are measured or the cost model's."""
    try:
        tiles = module("moegen_triton.kernels.tiles")
    except Absent:
        return "none"
    return "measured" if tiles.MEASURED.exists() else "cost model"
