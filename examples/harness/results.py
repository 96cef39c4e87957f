"""What an example found, as data: runs, and what a paper claims beside what was seen.

`Results.data` is the format of results.json, which the gallery and the plots are made from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = "moegen example"
VERSION = 1


@dataclass(frozen=True)
class About:
    """What an example is of, in words that the gallery prints.

    name: of the module below examples/. paper: authors, year and title. lesson: one paragraph on
    what it taught the field.
    """

    name: str
    title: str
    paper: str
    lesson: str = ""


@dataclass(frozen=True)
class Claim:
    """What a paper claims, and what was seen of it here; holds: None if that cannot be said."""

    paper: str
    seen: str
    holds: bool | None


@dataclass(frozen=True)
class Loads:
    """How one routed layer was loaded: at each step the share of every expert, which sum to 1."""

    layer: str
    steps: list[int]
    shares: list[list[float]]


@dataclass
class Run:
    """One system trained once.

    on: which of several data sets or tasks, if there are several; each has plots of its own.
    parameters: all, and those that are active for one row (a token, an image); flops: to train on
    one, None where nobody counted. loss: (step, training loss), auxiliary losses left out.
    held_out: (step, measures by name), the last of them being the result. loads: a routed layer
    each. notes: further numbers of this run.
    """

    system: str
    seed: int = 0
    on: str = ""
    parameters: int | None = None
    active: int | None = None
    flops: float | None = None
    seconds: float = 0.0
    loss: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    loads: list[Loads] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The system, and what it was trained on if that is said."""
        return f"{self.on}: {self.system}" if self.on else self.system

    @property
    def final(self) -> dict[str, float]:
        """The last measures on rows held out."""
        return self.held_out[-1][1] if self.held_out else {}

    def measure(self, step: int, values: Mapping[str, float]) -> None:
        """Keep measures on rows held out; those of the same step are replaced."""
        if self.held_out and self.held_out[-1][0] == step:
            self.held_out.pop()
        self.held_out.append((step, {name: float(value) for name, value in values.items()}))


@dataclass
class Results:
    """All that an example leaves behind.

    data: a sentence on the data with source and licence. runs: a system may have several, with
    other seeds. figures: further plots by the name of their file, without .png.
    """

    data: str
    runs: list[Run]
    claims: list[Claim]
    figures: dict[str, Any] = field(default_factory=dict)

    def as_data(self, about: About, setting: Mapping[str, Any]) -> dict[str, Any]:
        """As JSON has it: no NaN, no infinity; setting: quick, seed and what else was asked."""
        made = {
            "format": FORMAT,
            "version": VERSION,
            "about": asdict(about),
            "setting": dict(setting),
            "data": self.data,
            "claims": [asdict(claim) for claim in self.claims],
            "runs": [asdict(run) for run in self.runs],
        }
        clean: dict[str, Any] = _finite(made)
        return clean


def by_name(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seeds alone, together, in the order in which they were made."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.name, []).append(run)
    return found


def by_data(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs on the same data, together."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.on, []).append(run)
    return found


def final_mean(runs: Sequence[Run], name: str) -> float:
    """A final measure, the mean over some runs."""
    values = [run.final[name] for run in runs]
    return sum(values) / len(values)


def thinned(count: int, most: int) -> list[int]:
    """At most so many places of 0 ... count - 1, evenly spread, with both ends."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def _finite(value: Any) -> Any:
    """The same with None for what JSON cannot say, and floats of 6 significant digits."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
