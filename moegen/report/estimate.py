"""The report of one estimate, and the table of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from rich.console import Console
from rich.text import Text

from moegen.estimator import Estimate
from moegen.report import numbers
from moegen.report.memory import print_memory
from moegen.report.parameters import print_parameters
from moegen.report.screen import note, plain, table
from moegen.report.work import print_flops


def print_estimate(screen: Console, made: Estimate) -> None:
    """Everything known of one spec at one workload."""
    spec, work, counts = made.plan.spec, made.plan.workload, made.counts
    total, active = numbers.both(counts.total), numbers.both(counts.active)
    screen.print(Text.assemble(plain(spec.name), f": {total} parameters, {active} active"))
    longest = getattr(spec.model, "max_sequence", work.sequence)
    if work.sequence > longest:
        beyond = f"{numbers.exact(work.sequence)} tokens are more than its max_sequence"
        note(screen, f"{beyond}, {numbers.exact(longest)}.")
    print_parameters(screen, made)
    print_flops(screen, made)
    print_memory(screen, made)


@dataclass(frozen=True)
class Row:
    """What a sweep keeps of one combination."""

    values: tuple[str, ...]
    total: int
    active: int
    flops: Fraction
    training: int
    cache: Fraction
    fits: tuple[bool, bool] | None

    @classmethod
    def of(cls, values: Sequence[str], made: Estimate) -> Row:
        """The row of a combination's values and its estimate."""
        return cls(
            tuple(values),
            made.counts.total,
            made.counts.active,
            made.forward_flops,
            made.training.total,
            made.cache_bytes_per_token,
            (made.fit.training, made.fit.inference) if made.fit else None,
        )


def print_sweep(
    screen: Console, title: str, paths: Sequence[str], rows: Sequence[Row], gpu: str | None
) -> None:
    """One line a combination; the columns on the left are what is varied."""
    facts = (">total", ">active", ">FLOPs/token", ">training GB", ">cache B/token")
    fits = (f"{gpu} trains", "serves") if gpu else ()
    made = table(title, [*(f">{visible_path(path)}" for path in paths), *facts, *fits])
    for row in rows:
        verdicts = ["yes" if fit else "no" for fit in row.fits or ()]
        made.add_row(
            *map(plain, row.values),
            numbers.count(row.total),
            numbers.count(row.active),
            numbers.flops(row.flops),
            f"{row.training / 1e9:,.2f}",
            numbers.exact(row.cache),
            *verdicts,
        )
    screen.print(made)
    note(screen, f"FLOPs/token: forward. training GB: on one device; {numbers.BYTES_NOTE}.")


def visible_path(path: str) -> str:
    """A path without the section that all of them are in."""
    return str(plain(path.removeprefix("model.")))
