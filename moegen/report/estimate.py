"""The report of one estimate."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from moegen.errors import visible
from moegen.estimator import Estimate
from moegen.parameters import Counts
from moegen.report import numbers
from moegen.report.memory import print_memory
from moegen.report.parameters import print_parameters
from moegen.report.screen import note, print_warning
from moegen.report.work import print_flops
from moegen.spec.words import article


def headline(name: str, counts: Counts, unit: str) -> Text:
    """A model's name and its size in one line."""
    active = f"{numbers.count(counts.active)} active for {article(unit)}"
    return Text.assemble((visible(name), "bold"), f": {numbers.parameters(counts.total)}, {active}")


def print_estimate(screen: Console, made: Estimate) -> None:
    """Everything known of one spec at one workload."""
    spec, work, counts = made.plan.spec, made.plan.workload, made.counts
    screen.print(headline(spec.name, counts, spec.model.active_for))
    longest = getattr(spec.model, "max_sequence", work.sequence)
    if work.sequence > longest:
        beyond = f"{numbers.exact(work.sequence)} tokens are more than its max_sequence"
        note(screen, f"{beyond}, {numbers.exact(longest)}.")
    print_parameters(screen, made)
    print_flops(screen, made)
    print_memory(screen, made)
    for problem in made.plan.warnings:
        print_warning(screen, problem)
