"""How long a kernel takes in a tile, by a model of waves of programs over a chip.

A processor holds a few programs at once. Their time is that of the products at the rate
of the tensor cores, or of fetching the operands from the cache, whichever is longer,
and for each wave of programs a start and an end. No kernel is faster than the memory.

On H100 and at Qwen3-30B-A3B's sizes, 1024 tokens to 32768, the forward pass comes within
16% of the times that the fastest kernels in Triton were published with. At widths of 1536
and 4096, both passes come within 12% of those in CuTe.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .candidates import Tile
from .chips import Chip, generation

#: Seconds in which a program fills its pipeline, and writes what is left at its end.
EDGE = 1.5e-6
#: Share of the time of a program's last reads and writes that it waits for.
EXPOSED = 0.5
#: Seconds from asking the memory for bytes until they are there.
LATENCY = 8e-7
#: Share of the attainable rates that compiled loops reach, by published timings of
#: Triton kernels on H100.
LOOP = 0.87
#: Share of the time of products that all-TMA kernels save over gathering ones.
CONTIGUOUS_GAIN = 0.05
#: Registers of a processor, and of a thread beside its sums.
REGISTERS = 65536
BESIDE = {"hidden_gradient": 96}
BESIDE_OTHERS = 64


class Work(NamedTuple):
    """One kernel's products: ``columns`` sums of length ``depth`` for each row.

    weight_gradient sums over rows instead, for ``columns`` times ``depth`` entries of
    each expert.
    """

    rows: int
    experts: int
    columns: int
    depth: int
    #: Numbers that are read and written beside operands and weights, for each row.
    traffic: int = 0
    #: Sums that a column of a tile stands for: two of gate and up.
    sums: int = 1
    #: Rows of operands that exist apart: tokens, where rows are gathered.
    distinct: int = 0


def work_of(
    kernel: str,
    rows: int,
    experts: int,
    d: int,
    n: int,
    sums: int = 1,
    choices: int = 1,
    save: bool = True,
) -> Work:
    """Return the work of a kernel of a feed-forward of widths d and n.

    ``sums`` is 2 where a hidden number comes of two sums; ``choices`` is how many rows
    each token has, where rows are gathered; ``save`` is for the backward pass.
    """
    tokens = -(-rows // choices)
    if kernel == "up":
        return Work(rows, experts, n, d, (sums * save + 1) * n, sums, tokens)
    if kernel == "hidden_gradient":
        return Work(rows, experts, n, d, (2 * sums + 1) * n, 1, tokens)
    if kernel == "weight_gradient":
        return Work(rows, experts, d, n, 0, 1, tokens)
    return Work(rows, experts, d, n, d, 1, rows)


def row_tiles(rows: int, experts: int, m: int) -> float:
    """How many tiles of m rows there are when rows fall on experts by chance.

    An expert's rows are about Poisson; its tiles are counted by whether rows remain.
    """
    if experts == 0:
        return 0.0
    mean = rows / experts
    if mean > 64 * m:
        return rows / m + experts / 2
    tiles, spread = -math.expm1(-mean), math.sqrt(2 * mean) or 1.0
    last = int((mean + 6 * math.sqrt(mean)) / m) + 2
    for full in range(1, last):
        tiles += 0.5 * math.erfc((full * m + 0.5 - mean) / spread)
    return experts * tiles


def touched(rows: int, experts: int) -> float:
    """How many experts have rows when these fall on them by chance."""
    return experts * -math.expm1(-rows / experts) if experts else 0.0


def resident(kernel: str, tile: Tile, sums: int, size: int, chip: Chip) -> int:
    """How many programs in a tile a processor holds at once, at least one."""
    shared = tile.stages * (tile.m + sums * tile.n) * tile.k * size + 1024
    threads = 32 * tile.warps
    numbers = tile.m * tile.n * sums / threads
    if generation(chip.capability) == 100:
        numbers /= 2  # sums are in a memory of their own
    beside = BESIDE.get(kernel, BESIDE_OTHERS)
    registers = threads * min(255, numbers + beside)
    most = min(chip.shared_of_processor // shared, int(REGISTERS // registers))
    return max(1, min(most, 2048 // threads))


def seconds(kernel: str, tile: Tile, work: Work, size: int, chip: Chip) -> float:
    """Return how long a kernel takes in a tile, for numbers of ``size`` bytes."""
    if work.rows == 0:
        return chip.launch
    if kernel == "weight_gradient":
        entries = -(-work.columns // tile.m) * -(-work.depth // tile.n)
        programs = float(work.experts * entries)
        steps = max(1.0, work.rows / work.experts / tile.k + 0.5)
        weights = float(work.experts * work.columns * work.depth)
        finished = weights
        operands = work.distinct * work.columns + work.rows * work.depth
    else:
        programs = row_tiles(work.rows, work.experts, tile.m)
        programs *= -(-work.columns // tile.n)
        steps = float(-(-work.depth // tile.k))
        experts = touched(work.rows, work.experts)
        weights = experts * work.sums * work.columns * work.depth
        finished = float(work.rows * work.traffic)
        operands = work.distinct * work.depth + work.rows * work.traffic
    held = resident(kernel, tile, work.sums, size, chip)
    step = _step(tile, work.sums, size, chip)
    whole, left = divmod(programs, chip.processors * held)
    last = math.ceil(left / chip.processors)
    busy = steps * step * (whole * held + last)
    # A program's end is hidden behind others of its processor, if these are there.
    share = finished * size / max(1.0, programs)
    edge = EDGE + EXPOSED * share * chip.processors / chip.bandwidth
    edges = edge * (whole / held + 1)
    flying = min(programs, chip.processors * held) * _fetched(tile, work.sums, size)
    flying *= max(1, tile.stages - 1)
    bandwidth = min(chip.bandwidth, flying / LATENCY)
    return max(busy + edges, (weights + operands) * size / bandwidth) + chip.launch


def _fetched(tile: Tile, sums: int, size: int) -> int:
    """Bytes of the operands of one step of a program."""
    return (tile.m + sums * tile.n) * tile.k * size


def _step(tile: Tile, sums: int, size: int, chip: Chip) -> float:
    """Seconds of one step of a program that has a processor to itself."""
    # Instructions of the newer tensor cores take 64 rows or more; below that, the
    # older ones are used, at about half the rate.
    short = generation(chip.capability) in (90, 100) and tile.m < 64
    rate = (chip.flops_fp32 if size == 4 else chip.flops) / chip.processors
    products = 2 * tile.m * sums * tile.n * tile.k / (rate / 2 if short else rate)
    cache = chip.cache_bandwidth / chip.processors
    return max(products, _fetched(tile, sums, size) / cache) / LOOP


def permutes(n: int, chip: Chip, rows_of_expert: float = math.inf) -> bool:
    """Whether to gather rows once, for experts of width n, and read them by TMA then.

    The copy costs r/n of the products' time, r = 2/3 FLOP/s over bytes/s, so it pays
    for wide experts alone, and never where reading weights takes longer than products
    or where the chip has no TMA.
    """
    if generation(chip.capability) < 90:
        return False
    ratio = 2 * chip.flops / (3 * chip.bandwidth)
    return ratio / n < CONTIGUOUS_GAIN and rows_of_expert > 1.5 * ratio
