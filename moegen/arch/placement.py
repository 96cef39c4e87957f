"""Placement: which layers of a stack a part stands in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field, model_validator

from moegen.spec.element import Element, Path


class Placement(Element):
    """A set of layers (0-based): an explicit list, the last n, or every n-th between the ends."""

    every: int = Field(1, ge=1, description="one layer in every so many")
    offset: int = Field(0, ge=0, description="the first of them: index modulo `every`")
    first_dense: int = Field(0, ge=0, description="leave out so many layers at the start")
    last_dense: int = Field(0, ge=0, description="leave out so many layers at the end")
    last: int | None = Field(None, ge=1, description="only so many layers at the end")
    layers: tuple[int, ...] | None = Field(None, description="exactly these layers")

    @model_validator(mode="before")
    @classmethod
    def _all(cls, value: Any) -> Any:
        return {} if value == "all" else value

    def rules(self) -> Iterator[tuple[Path, str]]:
        """An offset below the stride, and one way of choosing at a time."""
        if self.offset >= self.every:
            yield ("offset",), f"offset is {self.offset} but must be below every, {self.every}"
        if self.layers is not None:
            for index, layer in enumerate(self.layers):
                if layer < 0:
                    yield ("layers", index), f"layers are counted from 0, so not {layer}"
            if len(set(self.layers)) < len(self.layers):
                yield ("layers",), "a layer is listed twice"
            others = self.model_fields_set - {"layers"}
            for name in sorted(others):
                yield (name,), f"layers lists the layers already, so {name} has no say"

    def outside(self, depth: int) -> Iterator[tuple[Path, str]]:
        """What points outside a stack of `depth` layers."""
        for index, layer in enumerate(self.layers or ()):
            if layer >= depth:
                last = depth - 1
                yield ("layers", index), f"layer {layer} is outside the model: the last is {last}"
        for name in ("first_dense", "last_dense", "last"):
            value = getattr(self, name) or 0
            if value > depth:
                yield (name,), f"{name} is {value} but the model has {depth} layers"
        if not list(self.outside_simple(depth)) and not self.of(depth):
            yield (), f"no layer of the {depth} is chosen"

    def outside_simple(self, depth: int) -> Iterator[int]:
        """Listed layers beyond the stack."""
        return (layer for layer in self.layers or () if layer >= depth)

    def of(self, depth: int) -> tuple[int, ...]:
        """The layers chosen of a stack of `depth`."""
        if self.layers is not None:
            return tuple(sorted(self.layers))
        start = depth - self.last if self.last else 0
        start, stop = max(start, self.first_dense), depth - self.last_dense
        return tuple(i for i in range(start, stop) if i % self.every == self.offset)
