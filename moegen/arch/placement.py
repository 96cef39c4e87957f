"""Placement: which layers of a stack a part stands in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moegen.spec.element import Element, Path
from moegen.spec.words import listed


class Placement(Element):
    """A set of layers (0-based): one in every so many between the ends, or some of these.

    Or else exactly those of a list, or extra layers between the stack's own.
    """

    every: int = Field(1, ge=1, description="one layer in every so many")
    offset: int = Field(0, ge=0, description="the first of them: index modulo `every`")
    first_dense: int = Field(0, ge=0, description="leave out so many layers at the start")
    last_dense: int = Field(0, ge=0, description="leave out so many layers at the end")
    first: int | None = Field(None, ge=1, description="of these, only so many from the start")
    middle: int | None = Field(None, ge=1, description="of these, only so many in the middle")
    last: Annotated[int, Field(ge=1)] | Literal["half"] | None = Field(
        None, description="of these, only so many at the end; half: the second half"
    )
    layers: tuple[int, ...] | None = Field(None, description="exactly these layers")
    insert: int | None = Field(
        None, ge=1, description="add so many routed sublayers, evenly between the layers (BASE)"
    )

    @model_validator(mode="before")
    @classmethod
    def _all(cls, value: Any) -> Any:
        return {} if value == "all" else value

    def rules(self) -> Iterator[tuple[Path, str]]:
        """An offset below the stride, and one way of choosing at a time."""
        if self.offset >= self.every:
            yield ("offset",), f"offset is {self.offset} but must be below every, {self.every}"
        for index, layer in enumerate(self.layers or ()):
            if layer < 0:
                yield ("layers", index), f"layers are counted from 0, so not {layer}"
        if len(set(self.layers or ())) < len(self.layers or ()):
            yield ("layers",), "a layer is listed twice"
        if self.layers is not None:
            yield from self._alone("layers", "layers lists the layers already")
        elif self.insert:
            yield from self._alone("insert", "insert chooses none of the layers that are there")
        counts = [name for name in _COUNTS if getattr(self, name) is not None]
        for name in counts[1:]:
            yield (name,), f"only one of {listed(_COUNTS)} can be said, and {counts[0]} is"

    def _alone(self, way: str, reason: str) -> Iterator[tuple[Path, str]]:
        """Other fields beside a way of choosing that leaves them nothing."""
        for name, info in type(self).model_fields.items():
            if name != way and getattr(self, name) != info.default:
                yield (name,), f"{reason}, so {name} has no say"

    def outside(self, depth: int) -> Iterator[tuple[Path, str]]:
        """What points outside a stack of `depth` layers."""
        found = False
        for index, layer in enumerate(self.layers or ()):
            if layer >= depth:
                found, last = True, depth - 1
                yield ("layers", index), f"layer {layer} is outside the model: the last is {last}"
        left = {name: len(self._between(depth)) for name in _COUNTS}
        for name in ("first_dense", "last_dense", *_COUNTS, "insert"):
            value = getattr(self, name)
            if not isinstance(value, int):
                continue
            if value > depth:
                found = True
                yield (name,), f"{name} is {value} but the model has {depth} layers"
            elif value > left.get(name, depth):
                found = True
                yield (name,), f"{name} is {value} but the layers to take from are {left[name]}"
        if not found and not self.insert and not self.of(depth):
            yield (), f"no layer of the {depth} is chosen"

    def of(self, depth: int) -> tuple[int, ...]:
        """The layers chosen of a stack of `depth`."""
        if self.layers is not None:
            return tuple(sorted(self.layers))
        if self.insert:
            return ()
        found = self._between(depth)
        size = len(found)
        if self.first:
            return found[: self.first]
        if self.middle:
            start = (size - self.middle + 1) // 2
            return found[start : start + self.middle]
        last = size - size // 2 if self.last == "half" else self.last
        return found[size - last :] if last else found

    def inserted(self, depth: int) -> tuple[int, ...]:
        """Where `insert` puts extra layers among `depth` others: indices in the longer stack.

        In their order, as each goes into the list that already holds those before it:
        `stack.insert(index, extra)`.
        """
        n = self.insert or 0
        return tuple((i + 1) * depth // (n + 1) for i in range(n))

    def _between(self, depth: int) -> tuple[int, ...]:
        """The layers between the ends that the stride meets."""
        between = range(self.first_dense, depth - self.last_dense)
        return tuple(i for i in between if i % self.every == self.offset)


_COUNTS = ("first", "middle", "last")
