"""Times of several variants, interleaved in one run, and what the device does at best."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

# Called with the number of the copy of the inputs that it shall use.
Step = Callable[[int], object]

LEAST_SAMPLES, MOST_SAMPLES = 5, 100
# What is so many times slower than the fastest gets few samples.
SLOW, SLOW_SAMPLES = 3.0, 3
# Steps shorter than this many seconds are timed several at once.
SHORT, MOST_AT_ONCE = 2e-3, 20


@dataclass
class Samples:
    """Milliseconds of each variant; ratios use those of the same round."""

    of: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """The median of a variant."""
        return statistics.median(self.of[name])

    def ratio(self, name: str, other: str) -> float:
        """How many times as long `other` takes: the median over rounds that have both."""
        pairs = zip(self.of[other], self.of[name], strict=False)
        return statistics.median(a / b for a, b in pairs)


class Clock:
    """Times steps by events of the device, or on a CPU by the wall or the process's own time."""

    def __init__(self, device: torch.device, *, own_time: bool = False) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.now = time.process_time if own_time else time.perf_counter

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def sample(self, step: Step, first: int, count: int) -> float:
        """Milliseconds a step, of `count` in a row that start on an idle device."""
        self.wait()
        if not self.cuda:
            start = self.now()
            for i in range(count):
                step(first + i)
            return 1e3 * (self.now() - start) / count
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        for i in range(count):
            step(first + i)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / count


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the samples."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleaved(
    steps: dict[str, Step],
    device: torch.device,
    seconds: float,
    most: int = MOST_SAMPLES,
    least: int = LEAST_SAMPLES,
    *,
    own_time: bool = False,
) -> Samples:
    """Rounds of one sample of each variant, each round beginning with another, for some seconds.

    The slow ones stop after a few rounds, so that pairs of the others are many.
    """
    clock, samples = Clock(device, own_time=own_time), Samples({name: [] for name in steps})
    estimate: dict[str, float] = {}
    if most == 1:  # only that it runs is asked
        return Samples({name: [clock.sample(step, 0, 1)] for name, step in steps.items()})
    for name, step in steps.items():
        clock.sample(step, 0, 1)  # compiles, tunes, fills caches
        estimate[name] = clock.sample(step, 1, 1) / 1e3
        if estimate[name] < 0.1:
            estimate[name] = clock.sample(step, 2, 3) / 1e3
    if not steps:
        return samples
    fastest = min(estimate.values())
    slow = {name for name in steps if estimate[name] > SLOW * fastest}
    spent = sum(estimate[name] * SLOW_SAMPLES for name in slow)
    at_once = {
        name: max(1, min(MOST_AT_ONCE, int(SHORT / max(estimate[name], 1e-6)))) for name in steps
    }
    a_round = sum(estimate[name] * at_once[name] for name in steps if name not in slow)
    rounds = int(max(seconds - spent, 0) / max(a_round, 1e-6))
    rounds = max(least, min(rounds, most))
    names = list(steps)
    with no_collection():
        for i in range(rounds):
            for j in range(len(names)):
                name = names[(i + j) % len(names)]
                if name in slow and i >= min(SLOW_SAMPLES, least):
                    continue
                count = 1 if name in slow else at_once[name]
                samples.of[name].append(clock.sample(steps[name], i * count, count))
    return samples


def capture(step: Step, copies: int, into: list[Step]) -> None:
    """Append the step as CUDA graphs, one a copy of the inputs; raises what capturing raises."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(copies):
            step(i)
    usual = torch.cuda.current_stream()
    usual.wait_stream(stream)
    graphs, kept = [], []
    try:
        for i in range(copies):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept.append(step(i))
            graphs.append(graph)
    finally:
        torch.cuda.set_stream(usual)  # a capture that fails leaves its own stream

    def replay(i: int) -> object:
        graphs[i % copies].replay()
        return kept[i % copies]

    into.append(replay)


def _best(step: Step, device: torch.device, repeats: int) -> float:
    """Seconds of the median of several steps."""
    clock = Clock(device)
    for i in range(3):
        step(i)
    return statistics.median(clock.sample(step, i, 1) for i in range(repeats)) / 1e3


def device_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of a large product in bf16 and bytes/s of a copy, both measured."""
    if device.type != "cuda":
        return {}
    side, size = 8192, 2**30
    left = torch.randn(side, side, device=device).bfloat16()
    right = torch.randn(side, side, device=device).bfloat16()
    product = torch.empty_like(left)
    rates = {
        "matmul_flops": 2
        * side**3
        / _best(lambda _: torch.mm(left, right, out=product), device, 30)
    }
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates["copy_bandwidth"] = 2 * size / _best(lambda _: target.copy_(source), device, 30)
    return rates
