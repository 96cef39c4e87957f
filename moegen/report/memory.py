"""Tables of memory: weights and cache, training, inference, and whether a GPU holds them."""

from __future__ import annotations

from rich.console import Console

from moegen.estimator import Estimate, Fit, Memory
from moegen.report import numbers
from moegen.report.screen import heading, note, table


def print_memory(screen: Console, made: Estimate) -> None:
    """All about memory."""
    work = made.plan.workload
    shape = f"{work.batch} x {numbers.exact(work.sequence)} tokens"
    kept = ", layers checkpointed" if made.checkpointing else ""
    _lines(screen, f"Memory for training: {shape}, {made.optimizer}{kept}", made.training)
    _lines(screen, f"Memory for inference: {shape} of context", made.inference)
    per_token = made.cache_bytes_per_token
    screen.print(
        f"Cache: {numbers.exact(per_token)} bytes for each token; "
        f"{numbers.size(made.cache_bytes)} for {shape}."
    )
    note(
        screen,
        "On one device. exact: follows from the spec; bound: at most this; assumed: a round "
        f"figure. {numbers.BYTES_NOTE}.",
    )
    if made.fit:
        _fit(screen, made, made.fit)


def _lines(screen: Console, title: str, memory: Memory) -> None:
    footer = ("total", numbers.size(memory.total), "", "")
    rows = table(title, ("what", ">bytes", "certainty", "note"), footer=footer)
    for line in memory.lines:
        rows.add_row(line.name, numbers.size(line.bytes), line.certainty, line.note)
    screen.print()
    screen.print(rows)


def _fit(screen: Console, made: Estimate, fit: Fit) -> None:
    gpu = fit.gpu
    heading(screen, f"One {gpu.title}: {numbers.size(gpu.memory)}")
    for name, fits, memory in (
        ("training", fit.training, made.training),
        ("inference", fit.inference, made.inference),
    ):
        free = gpu.memory - memory.total
        verdict = f"fits, {numbers.size(free)} left" if fits else f"lacks {numbers.size(-free)}"
        screen.print(f"  {name:<9}  {verdict}")
    spent, chain = numbers.seconds(fit.forward.total), numbers.seconds(fit.forward.seconds)
    screen.print(f"  roofline   a forward pass takes {spent} or more, {chain} of it in one chain")
    for advice in fit.advice:
        screen.print(f"  - {advice}")
    peak, bandwidth = numbers.work(int(gpu.flops)), numbers.size(int(gpu.bandwidth))
    note(screen, f"{peak}/s dense bf16, {bandwidth}/s: {gpu.source}.")
