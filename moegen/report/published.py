"""Holds the figures that authors print against what is counted, to the digits they print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Any

from moegen.arch.parts import Part, part_of
from moegen.parameters import Counts
from moegen.spec.words import listed

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
CONVENTIONS = {
    "active": "all that one uses",
    "active_without_input_embedding": "without the input embedding",
    "active_without_embeddings": "without embedding and head",
}


@dataclass(frozen=True)
class Figure:
    """One published figure, the count it is nearest to, and whether that rounds to it.

    convention: the key in CONVENTIONS by which active parameters are counted; of a total the parts
    left out, in words, or None.
    """

    name: str
    printed: str
    counted: int
    convention: str | None
    agrees: bool

    @property
    def counting(self) -> str:
        """How it is counted, in words; nothing if that is all parameters."""
        return CONVENTIONS.get(self.convention or "", self.convention or "")


@dataclass(frozen=True)
class Published:
    """The figures of a spec, and its note on why one differs."""

    figures: tuple[Figure, ...]
    note: str | None


def conventions(counts: Counts) -> dict[str, int]:
    """The active parameters of one token in each way that publishers count them."""
    return {name: getattr(counts, name) for name in CONVENTIONS}


def published(data: Mapping[str, Any], counts: Counts) -> Published | None:
    """What the spec's `published` section says, against the counts; None if it says nothing."""
    said = data.get("published") or {}
    figures = []
    if said.get("total") is not None:
        total = str(said["total"])
        figures.append(_total(total, said.get("without") or (), counts))
    if said.get("active") is not None:
        figures.append(_active(str(said["active"]), counts))
    return Published(tuple(figures), said.get("note")) if figures else None


def agrees(printed: str, count: int) -> bool:
    """Whether a count rounds to a figure such as 46.7B in the digits it has.

    Zeros at the end of a whole number are not taken for digits: 280B has two.
    """
    figure, unit = _read(printed)
    if figure is None:
        return False
    exponent = int(figure.as_tuple().exponent)
    if exponent >= 0:
        figure = figure.normalize()
        exponent = int(figure.as_tuple().exponent)
    scaled = Decimal(count) / unit
    return scaled.quantize(Decimal(1).scaleb(exponent), ROUND_HALF_UP) == figure


def _total(printed: str, without: Sequence[Part], counts: Counts) -> Figure:
    """The total, without the parts that the authors do not count."""
    left = [s.count for role, s in counts.by_role.items() if part_of(role) not in without]
    convention = f"without {listed(without, 'and')}" if without else None
    return Figure("total", printed, sum(left), convention, agrees(printed, sum(left)))


def _active(printed: str, counts: Counts) -> Figure:
    """The first convention that agrees, else the nearest one."""
    figure, unit = _read(printed)
    target = 0 if figure is None else int(figure * unit)
    ways = conventions(counts)
    matching = [name for name, value in ways.items() if agrees(printed, value)]
    name = matching[0] if matching else min(ways, key=lambda way: abs(ways[way] - target))
    return Figure("active", printed, ways[name], name, bool(matching))


def _read(printed: str) -> tuple[Decimal | None, int]:
    unit = UNITS.get(printed[-1:].upper(), 1)
    digits = printed[:-1] if unit > 1 else printed
    try:
        return Decimal(digits), unit
    except InvalidOperation:
        return None, unit
