"""Sweeps: one spec at every combination of some values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from moegen import api
from moegen.estimator import Estimate
from moegen.report import numbers
from moegen.report.facts import Facts, facts
from moegen.report.screen import console, note, plain, progress_bar, table
from moegen.spec.overrides import sweep

Combination = Sequence[str]


@dataclass(frozen=True)
class Row:
    """What a table keeps of one combination."""

    values: tuple[str, ...]
    total: int
    active: int
    flops: Fraction
    training: int
    cache: Fraction | None
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


def varied(overrides: Sequence[str]) -> list[int]:
    """Which of the overrides have several values."""
    return [index for index, text in enumerate(overrides) if len(sweep([text])) > 1]


def sweep_facts(
    spec: str, combinations: Sequence[Combination], names: Sequence[int], workload: dict[str, Any]
) -> Facts:
    """A sweep as JSON: for each combination the overrides that make it, and its estimate."""
    return {
        "combinations": [
            {"overrides": _pairs(combination), "estimate": facts(made)}
            for combination, made in _estimates(spec, combinations, workload)
        ]
    }


def print_sweep(
    spec: str, combinations: Sequence[Combination], names: Sequence[int], workload: dict[str, Any]
) -> None:
    """One line a combination; the columns on the left are what is varied."""
    gpu = workload.get("gpu")
    paths = [combinations[0][index].partition("=")[0] for index in names]
    columns = [">total", ">active", ">FLOPs", ">training", ">cache"]
    heads = [f">{plain(path).plain.replace('.', f'.{chr(10)}')}" for path in paths]
    made = table(None, [*heads, *columns, *(("trains", "serves") if gpu else ())])
    for combination, one in _estimates(spec, combinations, workload):
        values = [combination[index].partition("=")[2] for index in names]
        _add(made, Row.of(values, one))
    screen = console()
    screen.print(made)
    note(
        screen,
        "FLOPs: of a forward pass for one token (or image). training: memory on one device. cache: "
        f"bytes for each token of context. {numbers.BYTES_NOTE}.",
    )
    if gpu:
        note(screen, f"trains, serves: whether one {gpu} holds it.")


def _add(made: Any, row: Row) -> None:
    made.add_row(
        *map(plain, row.values),
        numbers.count(row.total),
        numbers.count(row.active),
        numbers.flops(row.flops),
        f"{row.training / 1e9:,.2f} GB",
        "-" if row.cache is None else f"{numbers.exact(row.cache)} B",
        *("yes" if fits else "no" for fits in row.fits or ()),
    )


def _estimates(
    spec: str, combinations: Sequence[Combination], workload: dict[str, Any]
) -> Iterator[tuple[Combination, Estimate]]:
    """Every estimate in order, with a bar on a terminal; what is invalid is said at once."""
    for combination in combinations:
        api.load(spec, combination)
    with progress_bar() as bar:
        task = bar.add_task("", total=len(combinations))
        for combination in combinations:
            yield combination, api.estimate(spec, combination, **workload)
            bar.advance(task)


def _pairs(combination: Combination) -> dict[str, str]:
    parts = (text.partition("=") for text in combination)
    return {path: value for path, _, value in parts}
