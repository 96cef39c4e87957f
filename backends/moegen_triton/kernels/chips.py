"""What the cost model knows of a chip: read off the device, or of its generation."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

#: Shares of the vendor's peaks that long matrix products and copies reach.
ATTAINABLE_FLOPS, ATTAINABLE_BANDWIDTH = 0.81, 0.9


class Chip(NamedTuple):
    """One GPU; rates are those that are reached, not those of a datasheet."""

    name: str
    #: Compute capability as one number, 90 for 9.0.
    capability: int
    processors: int
    #: FLOP/s of 16-bit products with fp32 sums, and of fp32 products.
    flops: float
    flops_fp32: float
    #: Bytes/s of the memory, and of the cache that all processors share.
    bandwidth: float
    cache_bandwidth: float
    #: Bytes of shared memory: most of one program, and of a processor.
    shared: int
    shared_of_processor: int
    #: Bytes of the cache that all processors share.
    cache: int
    #: Seconds from one kernel's end to the next one's first product.
    launch: float = 4e-6


def _chip(
    name: str,
    capability: int,
    processors: int,
    tflops: tuple[float, float],
    tb_s: tuple[float, float],
    shared: tuple[int, int],
    cache: int,
) -> Chip:
    """Make a chip of its datasheet: TFLOP/s, TB/s of memory and cache, KiB, MiB."""
    half, single = (1e12 * rate * ATTAINABLE_FLOPS for rate in tflops)
    memory, shared_cache = (1e12 * rate * ATTAINABLE_BANDWIDTH for rate in tb_s)
    block, whole = (1024 * size for size in shared)
    return Chip(
        name,
        capability,
        processors,
        half,
        single,
        memory,
        shared_cache,
        block,
        whole,
        cache << 20,
    )


#: A common chip of each generation that the kernels are compiled for.
CHIPS = {
    chip.capability: chip
    for chip in (
        _chip("A100", 80, 108, (312, 19.5), (2.04, 5.5), (163, 164), 40),
        _chip("L40S", 89, 142, (362, 91.6), (0.864, 5.0), (99, 100), 96),
        _chip("H100", 90, 132, (989, 67), (3.35, 9.5), (227, 228), 50),
        _chip("B200", 100, 148, (2250, 80), (8.0, 18.0), (227, 228), 126),
        _chip("GeForce RTX 5090", 120, 170, (209, 105), (1.79, 7.0), (99, 100), 96),
    )
}


def generation(capability: int) -> int:
    """Return whose tiles a chip uses: the nearest generation not beyond it."""
    if capability == 86:  # its shared memory is that of 89
        return 89
    return max((known for known in CHIPS if known <= capability), default=80)


@lru_cache
def chip_of(device: torch.device) -> Chip:
    """Return the chip of a CUDA device; nothing waits for it."""
    seen = torch.cuda.get_device_properties(device)
    capability = 10 * seen.major + seen.minor
    usual = CHIPS[generation(capability)]
    share = seen.multi_processor_count / usual.processors
    # GeForce cards sum 16-bit products in fp32 at half the rate of their siblings.
    rate = share * 2.0 ** (("GeForce" in usual.name) - ("GeForce" in seen.name))
    chip = usual._replace(
        name=seen.name,
        capability=capability,
        processors=seen.multi_processor_count,
        flops=usual.flops * rate,
        flops_fp32=usual.flops_fp32 * share,
        shared=getattr(seen, "shared_memory_per_block_optin", 0) or usual.shared,
        shared_of_processor=getattr(seen, "shared_memory_per_multiprocessor", 0)
        or usual.shared_of_processor,
        cache=getattr(seen, "L2_cache_size", 0) or usual.cache,
    )
    width = getattr(seen, "memory_bus_width", 0)
    pulses = 2e3 * getattr(seen, "memory_clock_rate", 0)
    if not (width and pulses):
        return chip
    return chip._replace(bandwidth=width / 8 * pulses * ATTAINABLE_BANDWIDTH)
