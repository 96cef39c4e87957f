"""Results on a screen: every system beside its baselines, and claims beside what was seen."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from rich.console import Group
from rich.table import Table
from rich.text import Text

from examples.harness.metrics import spread
from examples.harness.results import Claim, Results, Run, by_name

HOLDS = {True: "yes", False: "no", None: "cannot be said"}


def report(results: Results) -> Group:
    """Both tables, below a sentence on the data."""
    return Group(Text(f"data: {results.data}\n"), systems(results), claims(results.claims))


def systems(results: Results) -> Table:
    """A line for each system: what it has, what it reached on rows held out, seconds to train.

    A column that no system has anything for is left out.
    """
    names = list(dict.fromkeys(name for run in results.runs for name in run.final))
    heads = ["system", "parameters", "active", "kFLOPs", *names, "seconds"]
    lines = [_line(name, runs, names) for name, runs in by_name(results.runs).items()]
    told = [any(cells) for cells in zip(*lines, strict=True)]
    table = Table(title="held-out results")
    for head in compress(heads, told):
        name = head == "system"
        table.add_column(head, justify="left" if name else "right", no_wrap=not name)
    for line in lines:
        table.add_row(*compress(line, told))
    return table


def claims(found: Sequence[Claim]) -> Table:
    """What the paper claims, what was seen here, and whether they agree."""
    table = Table(title="the paper, and what was seen here", show_lines=True)
    for head in ("the paper claims", "seen", "holds"):
        table.add_column(head)
    for claim in found:
        table.add_row(claim.paper, claim.seen, HOLDS[claim.holds])
    return table


def _line(name: str, runs: Sequence[Run], measures: Sequence[str]) -> list[str]:
    """The cells of one system; counts are those of its first run."""
    first = runs[0]
    flops = "" if first.flops is None else f"{first.flops / 1e3:,.1f}"
    measured = [_mean([run.final[n] for run in runs if n in run.final]) for n in measures]
    seconds = sum(run.seconds for run in runs) / len(runs)
    counts = (_count(first.parameters), _count(first.active))
    return [name, *counts, flops, *measured, f"{seconds:.1f}"]


def _mean(values: list[float]) -> str:
    """The mean, and with several values what they vary by."""
    if not values:
        return ""
    mean, deviation = spread(values)
    return f"{mean:.4f}" + (f" ± {deviation:.4f}" if len(values) > 1 else "")


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
