"""What the cost model says of a workload, and where the time of a pass goes by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.layer.record import Case, Run
from benchmarks.layer.report import table
from benchmarks.layer.shapes import Workload
from benchmarks.layer.variants import Absent, module


def predicted(work: Workload, device: torch.device) -> dict[str, float]:
    """Milliseconds by kind of step from the tiles' cost model; empty where it knows no chip."""
    if device.type != "cuda":
        return {}
    try:
        tiles, chips = (module(f"moegen_triton.kernels.{name}") for name in ("tiles", "chips"))
    except Absent:
        return {}
    chip = chips.chip_of(device)
    shape = (work.tokens, work.k, work.experts, work.d, work.n, work.torch_dtype)
    inference = tiles.predict(chip, *shape, training=False)
    found = {"inference": 1e3 * sum(inference.forward.values())}
    if not work.decodes:
        training = tiles.predict(chip, *shape)
        found["forward"] = 1e3 * sum(training.forward.values())
        found["backward"] = 1e3 * sum(training.backward.values())
        found["both"] = 1e3 * training.total
    return found


def predictions(run: Run) -> str:
    """A table of predicted and measured times."""
    rows = []
    for case in run.cases:
        for kind, milliseconds in case.predicted.items():
            for outcome in case.outcomes:
                measured = outcome.milliseconds_of(kind)
                if outcome.family != "ours, Triton" or not measured:
                    continue
                off = f"{milliseconds / measured - 1:+.0%}"
                times = [f"{milliseconds:.3g}", f"{measured:.3g}", off]
                rows.append([case.work.title, kind, outcome.variant, *times])
    if not rows:
        return "Nothing was predicted: this takes a GPU and a Triton variant."
    return table(["workload", "", "variant", "predicted ms", "measured ms", "off"], rows)


def kernel_times(step: Callable[[int], object], repeats: int = 5) -> dict[str, float]:
    """Milliseconds a step by kernel on a GPU, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    step(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for i in range(repeats):
            step(i)
        torch.cuda.synchronize()
    events: list[Any] = list(profiler.key_averages())
    found = {str(e.key): float(e.self_device_time_total) / 1e3 / repeats for e in events}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def kernels_page(case: Case) -> str:
    """Tables of the time by kernel of the variants that were profiled."""
    parts = []
    for outcome in case.outcomes:
        if not outcome.kernels:
            continue
        total = sum(outcome.kernels.values())
        rows = [
            [f"`{name[:90]}`", f"{ms:.3f}", f"{ms / total:.0%}"]
            for name, ms in outcome.kernels.items()
            if ms > 0.002 * total
        ]
        parts.append(
            f"Kernels of {outcome.variant}, forward+backward, {total:.3g} ms:\n\n"
            + table(["kernel", "ms", "share"], rows)
        )
    return "\n\n".join(parts)
