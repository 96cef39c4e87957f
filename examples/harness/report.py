"""Results on a screen: every system beside its baselines, and claims beside what was seen."""

from __future__ import annotations

from collections.abc import Sequence

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
    """A line for each system: what it has, what it reached on rows held out, seconds to train."""
    groups = by_name(results.runs)
    names = list(dict.fromkeys(name for run in results.runs for name in run.final))
    table = Table(title="held-out results")
    table.add_column("system", no_wrap=True)
    for head in ("parameters", "active", "kFLOPs", *names, "seconds"):
        table.add_column(head, justify="right")
    for system, runs in groups.items():
        first = runs[0]
        flops = "" if first.flops is None else f"{first.flops / 1e3:,.1f}"
        measured = [_mean([run.final[n] for run in runs if n in run.final]) for n in names]
        counts = (_count(first.parameters), _count(first.active))
        table.add_row(system, *counts, flops, *measured, _seconds(runs))
    return table


def claims(found: Sequence[Claim]) -> Table:
    """What the paper claims, what was seen here, and whether they agree."""
    table = Table(title="the paper, and what was seen here", show_lines=True)
    for head in ("the paper claims", "seen", "holds"):
        table.add_column(head)
    for claim in found:
        table.add_row(claim.paper, claim.seen, HOLDS[claim.holds])
    return table


def _mean(values: list[float]) -> str:
    """The mean, and with several values what they vary by."""
    if not values:
        return ""
    mean, deviation = spread(values)
    return f"{mean:.4f}" + (f" ± {deviation:.4f}" if len(values) > 1 else "")


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _seconds(runs: Sequence[Run]) -> str:
    return f"{sum(run.seconds for run in runs) / len(runs):.1f}"
