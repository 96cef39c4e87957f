"""Families: tables between a model's tensors and a checkpoint's, read in either direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from moegen.convert.layout import ConversionError, Held, Layout, Place, Source, layout
from moegen.errors import Problem

Rows = dict[Source, Source]  # ours: theirs
Part = Rows | tuple[Rows, ...]  # several: alternatives, of which exactly one applies


def maybe(rows: Rows) -> Part:
    """Rows that stand all together or not at all."""
    return rows, {}


@dataclass(frozen=True)
class Family:
    """How one model type of Hugging Face keeps what an emitted model keeps.

    model: what there is once. layer: what there is in every layer, below the two prefixes of
    `layers`; more: the same of further stacks. Where alternatives read alike, the first one is
    written.
    """

    name: str
    model: tuple[Part, ...]
    layer: tuple[Part, ...]
    layers: tuple[str, str] = ("layers.{layer}.", "model.layers.{layer}.")
    more: tuple[tuple[tuple[Part, ...], tuple[str, str]], ...] = ()

    def to_moegen(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an emitted model from a checkpoint's."""
        return _Conversion(self, tensors, theirs=True).run()

    def to_huggingface(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a checkpoint from an emitted model's."""
        return _Conversion(self, tensors, theirs=False).run()


@dataclass(frozen=True)
class _Pair:
    """One row in the direction of a conversion."""

    source: Layout
    target: Layout


class _Conversion:
    """One run over a family's table."""

    def __init__(self, family: Family, tensors: Mapping[str, Tensor], *, theirs: bool) -> None:
        """Prepare to read `theirs` and write ours, or the other way round."""
        self.family = family
        self.theirs = theirs
        self.held = Held(tensors)
        self.made: dict[str, Tensor] = {}
        self.wanted: set[str] = set()
        self.problems: list[Problem] = []

    def run(self) -> dict[str, Tensor]:
        """Convert everything, or say all that is amiss."""
        self._parts(self.family.model, Place(), Place())
        for parts, (ours, theirs) in ((self.family.layer, self.family.layers), *self.family.more):
            source, target = (theirs, ours) if self.theirs else (ours, theirs)
            for layer in range(self._depth(parts, source)):
                numbers = {"layer": layer}
                self._parts(parts, Place(source, numbers), Place(target, numbers))
        for name in self.held:
            if name not in self.wanted:
                self._amiss(f"{name} is left over: {self._side} has no place for it")
        if self.problems:
            raise ConversionError(self.problems)
        return self.made

    @property
    def _side(self) -> str:
        side = "checkpoint" if self.theirs else "model"
        return f"the table of {self.family.name} {side}s"

    def _amiss(self, sentence: str) -> None:
        self.problems.append(Problem(sentence))

    def _depth(self, parts: tuple[Part, ...], prefix: str) -> int:
        """Layers that any tensor belongs to, one at least."""
        start = Place(prefix).at("layer", "{}").name("")
        pairs = [p for part in parts for rows in _each(part) for p in self._pairs(rows)]
        patterns = {pattern for pair in pairs for pattern in pair.source.patterns}
        return max([1, *(self.held.count(start + pattern) for pattern in patterns)])

    def _pairs(self, rows: Rows) -> list[_Pair]:
        pairs = [(layout(ours), layout(theirs)) for ours, theirs in rows.items()]
        return [_Pair(b, a) if self.theirs else _Pair(a, b) for a, b in pairs]

    def _parts(self, parts: tuple[Part, ...], source: Place, target: Place) -> None:
        for part in parts:
            choices = [self._pairs(rows) for rows in _each(part)]
            pairs = min(choices, key=lambda c: (len(self._missing(c, source)), -len(c)))
            missing = dict.fromkeys(self._missing(pairs, source))
            for name in missing:
                self._amiss(f"{name} is missing: {self._side} needs it")
            for pair in pairs:
                names = pair.source.names(self.held, source)
                self.wanted.update(names)
                if missing.keys().isdisjoint(names):
                    self._move(pair, names, source, target)

    def _missing(self, pairs: list[_Pair], place: Place) -> list[str]:
        names = (name for pair in pairs for name in pair.source.names(self.held, place))
        return [name for name in names if name not in self.held]

    def _move(self, pair: _Pair, names: list[str], source: Place, target: Place) -> None:
        try:
            value = pair.source.read(self.held, source)
            self.made.update(pair.target.write(value, target))
        except (RuntimeError, IndexError) as error:
            shapes = sorted({tuple(self.held[name].shape) for name in names})
            listed = " and ".join(map(str, shapes))
            self._amiss(f"{names[0]} of shape {listed} does not fit {self._side}: {error}")


def _each(part: Part) -> tuple[Rows, ...]:
    return part if isinstance(part, tuple) else (part,)
