"""Tables of memory: weights and cache, training, inference, and whether a GPU holds them."""

from __future__ import annotations

from fractions import Fraction

from rich.console import Console

from moegen.estimator import Estimate, Fit, Memory, caches
from moegen.report import numbers
from moegen.report.screen import heading, note, table


def print_memory(screen: Console, made: Estimate) -> None:
    """All about memory."""
    work = made.plan.workload
    decodes = made.cache_bytes is not None
    shape = made.plan.spec.model.workload(work.batch, work.sequence)
    kept = ", layers checkpointed" if made.checkpointing else ""
    beside, with_ = made.beside, f", {made.backend}" if made.beside else ""
    title = f"Memory for training: {shape}, {made.optimizer}{kept}{with_}"
    _lines(screen, title, made.training, beside.training if beside else None)
    title = f"Memory for inference: {shape}{' of context' if decodes else ''}{with_}"
    _lines(screen, title, made.inference, beside.inference if beside else None)
    for name, (held, positions) in caches(made.plan).items() if decodes else ():
        each = f"{numbers.exact(Fraction(held, work.batch))} bytes for each sequence, of any length"
        if positions:
            each = f"{numbers.exact(Fraction(held, work.batch * positions))} bytes for each token"
        screen.print(f"{name.capitalize()}: {each}; {numbers.size(held)} for {shape}.")
    note(
        screen,
        "On one device. exact: follows from the spec; bound: at most this; assumed: a round "
        f"figure. {numbers.BYTES_NOTE}.",
    )
    if made.fit:
        _fit(screen, made, made.fit)


def _lines(screen: Console, title: str, memory: Memory, eager: Memory | None) -> None:
    """A table of memory, with the eager backend's in a column beside where it is given."""
    other = [numbers.size(eager.total)] if eager else []
    footer = ("total", numbers.size(memory.total), *other, "", "")
    columns = ("what", ">bytes", *([">eager"] if eager else []), "certainty", "note")
    rows = table(title, columns, footer=footer)
    for index, line in enumerate(memory.lines):
        other = [numbers.size(eager.lines[index].bytes)] if eager else []
        rows.add_row(line.name, numbers.size(line.bytes), *other, line.certainty, line.note)
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
    model, work = made.plan.spec.model, made.plan.workload
    if made.decode_flops is None:
        rate = model.units(work.batch, work.sequence) / fit.forward.total
        screen.print(f"             at most {numbers.exact(int(rate))} {model.unit}s a second")
    for advice in fit.advice:
        screen.print(f"  - {advice}")
    peak, bandwidth = numbers.work(int(gpu.flops)), numbers.size(int(gpu.bandwidth))
    note(screen, f"{peak}/s dense bf16, {bandwidth}/s: {gpu.source}.")
