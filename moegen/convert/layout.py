"""Layouts: how a tensor lies in named tensors, to be read from them and written to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moegen.errors import MoegenError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class ConversionError(MoegenError):
    """A checkpoint does not hold what a family's table says."""


class Held(dict[str, Tensor]):
    """Named tensors, with the largest number at each numbered place of their names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Index the names once; large checkpoints have tens of thousands."""
        super().__init__(tensors)
        self._largest: dict[str, int] = {}
        for name in self:
            for found in _NUMBER.finditer(name):
                key = f"{name[: found.start()]}{{}}{name[found.end() :]}"
                self._largest[key] = max(self._largest.get(key, 0), int(found[0]))

    def count(self, name: str) -> int:
        """How many tensors there are of a name with `{}` for a number, any between included."""
        return self._largest.get(name, -1) + 1


@dataclass(frozen=True)
class Place:
    """Where patterns stand: what comes before them, and the numbers of their placeholders."""

    prefix: str = ""
    numbers: Mapping[str, int | str] = field(default_factory=dict)

    def name(self, pattern: str) -> str:
        """The full name that a pattern stands for here."""
        return f"{self.prefix}{pattern}".format_map(self.numbers)

    def at(self, index: str, number: int | str) -> Place:
        """Here, with one more placeholder bound."""
        return Place(self.prefix, {**self.numbers, index: number})


class Layout(Protocol):
    """One tensor as it lies in one or more named ones.

    `read` and `write` undo each other bit by bit: values are moved, none is computed.
    """

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of its names."""

    def names(self, held: Held, place: Place) -> list[str]:
        """The names that `read` wants, whether they are held or not."""

    def read(self, held: Held, place: Place) -> Tensor:
        """The tensor, put together."""

    def write(self, value: Tensor, place: Place) -> Iterator[tuple[str, Tensor]]:
        """The tensor, taken apart."""


Source = str | Layout


@dataclass(frozen=True)
class Plain:
    """A tensor of its own; tables write just its pattern."""

    pattern: str

    @property
    def patterns(self) -> tuple[str, ...]:
        """The one pattern."""
        return (self.pattern,)

    def names(self, held: Held, place: Place) -> list[str]:
        """The one name."""
        return [place.name(self.pattern)]

    def read(self, held: Held, place: Place) -> Tensor:
        """As it is."""
        return held[place.name(self.pattern)]

    def write(self, value: Tensor, place: Place) -> Iterator[tuple[str, Tensor]]:
        """As it is."""
        yield place.name(self.pattern), value


@dataclass(frozen=True)
class Stack:
    """A tensor of one dimension less for each number of a placeholder, from 0 on.

    like: a tensor of the same side that has a row for each number; it tells if the last are
    missing.
    """

    source: Source
    like: str | None = None
    index: str = "expert"

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of the source."""
        return layout(self.source).patterns

    def names(self, held: Held, place: Place) -> list[str]:
        """Those of every number; of number 0 at least."""
        numbers = range(max(1, self._count(held, place)))
        each = layout(self.source)
        return [name for n in numbers for name in each.names(held, place.at(self.index, n))]

    def read(self, held: Held, place: Place) -> Tensor:
        """Stacked along a new first dimension."""
        numbers, each = range(self._count(held, place)), layout(self.source)
        return torch.stack([each.read(held, place.at(self.index, n)) for n in numbers])

    def write(self, value: Tensor, place: Place) -> Iterator[tuple[str, Tensor]]:
        """One after the other."""
        for number, part in enumerate(value):
            yield from layout(self.source).write(part, place.at(self.index, number))

    def _count(self, held: Held, place: Place) -> int:
        like = held.get(place.name(self.like)) if self.like else None
        if like is not None:
            return like.shape[0]
        free = place.at(self.index, "{}")
        return max(held.count(free.name(pattern)) for pattern in self.patterns)


@dataclass(frozen=True, init=False)
class Concat:
    """Tensors of equal shape end to end in their first dimension."""

    sources: tuple[Source, ...]

    def __init__(self, *sources: Source) -> None:
        """Take the sources in their order."""
        object.__setattr__(self, "sources", sources)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of all sources."""
        return tuple(p for source in self.sources for p in layout(source).patterns)

    def names(self, held: Held, place: Place) -> list[str]:
        """Of all sources."""
        return [name for source in self.sources for name in layout(source).names(held, place)]

    def read(self, held: Held, place: Place) -> Tensor:
        """Concatenated."""
        return torch.stack([layout(s).read(held, place) for s in self.sources]).flatten(0, 1)

    def write(self, value: Tensor, place: Place) -> Iterator[tuple[str, Tensor]]:
        """Split evenly."""
        parts = torch.unflatten(value, 0, (len(self.sources), -1))
        for source, part in zip(self.sources, parts, strict=True):
            yield from layout(source).write(part, place)


@dataclass(frozen=True)
class _Of:
    """Another way to see one source."""

    source: Source

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of the source."""
        return layout(self.source).patterns

    def names(self, held: Held, place: Place) -> list[str]:
        """Of the source."""
        return layout(self.source).names(held, place)


@dataclass(frozen=True)
class Transposed(_Of):
    """The last two dimensions the other way round."""

    def read(self, held: Held, place: Place) -> Tensor:
        """Turned round."""
        return layout(self.source).read(held, place).transpose(-1, -2).contiguous()

    def write(self, value: Tensor, place: Place) -> Iterator[tuple[str, Tensor]]:
        """Turned back."""
        return layout(self.source).write(value.transpose(-1, -2).contiguous(), place)


@dataclass(frozen=True)
class Interleaved(_Of):
    """Two halves laid out in turn, g0, u0, g1, u1, ..., that are wanted one after the other."""

    dim: int

    def read(self, held: Held, place: Place) -> Tensor:
        """The even ones, then the odd ones."""
        return _regroup(layout(self.source).read(held, place), self.dim, (-1, 2))

    def write(self, value: Tensor, place: Place) -> Iterator[tuple[str, Tensor]]:
        """Taken in turn from both halves."""
        return layout(self.source).write(_regroup(value, self.dim, (2, -1)), place)


@dataclass(frozen=True)
class Leading(_Of):
    """So many dimensions of size 1 before all others, which are not wanted."""

    ones: int

    def read(self, held: Held, place: Place) -> Tensor:
        """Without them."""
        value = layout(self.source).read(held, place)
        return value.reshape(value.shape[self.ones :])

    def write(self, value: Tensor, place: Place) -> Iterator[tuple[str, Tensor]]:
        """With them."""
        return layout(self.source).write(value[(None,) * self.ones], place)


def _regroup(value: Tensor, dim: int, shape: tuple[int, int]) -> Tensor:
    """Exchange the two dimensions of `shape` that a dimension is made of."""
    return torch.unflatten(value, dim, shape).transpose(dim, dim + 1).flatten(dim, dim + 1)


def layout(source: Source) -> Layout:
    """A pattern as the layout that it stands for."""
    return Plain(source) if isinstance(source, str) else source
