"""Turns a path of a spec into what may stand there, by the fields of the elements on the way."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import GroupedMetadata
from pydantic.fields import FieldInfo

from moegen.spec.element import Element, Kinds, OneOf, Path


@dataclass(frozen=True)
class Slot:
    """One thing that may stand at a place: a type, or a family's OneOf, and limits on it."""

    type: Any
    limits: tuple[Any, ...] = ()
    key: str = ""  # in a table, which may name the kind of what it holds

    def elements(self, value: Any) -> tuple[type[Element], ...]:
        """The element classes that a value in this slot may be meant as."""
        if isinstance(self.type, OneOf):
            return _member(self.type.family, value, self.key)
        if isinstance(self.type, type) and issubclass(self.type, Element):
            return (self.type,)
        return ()


@dataclass(frozen=True)
class Place:
    """Where a location of a validation error leads to in the data."""

    path: Path
    slots: tuple[Slot, ...]
    value: Any

    def elements(self) -> tuple[type[Element], ...]:
        """The element classes that this section may be."""
        return tuple(found for slot in self.slots for found in slot.elements(self.value))

    def keys(self) -> tuple[Slot, ...]:
        """What may be a key here, where keys are free."""
        tables = [get_args(slot.type) for slot in self.slots if _is_table(slot.type)]
        return tuple(found for args in tables for found in slots_of(args[0]))


def find(root: type[Element], data: Any, loc: tuple[str | int, ...]) -> Place:
    """Follow a location through data and fields; the names of union branches are no keys."""
    path: Path = ()
    slots: tuple[Slot, ...] = (Slot(root),)
    value = data
    for key in loc:
        allowed = below(slots, key, value)
        is_there, inner = _item(value, key)
        if allowed or is_there:
            path, slots, value = (*path, key), allowed, inner
    return Place(path, slots, value)


def below(slots: Iterable[Slot], key: str | int, value: Any) -> tuple[Slot, ...]:
    """What may stand under a key of a section, or at an index of a list."""
    return tuple(found for slot in slots for found in _enter(slot, key, value))


def places_of(root: type[Element], data: Any, key: str) -> list[Path]:
    """Each section of the whole spec that could hold a key, nearest to the root first."""
    found: list[Path] = []
    waiting: list[tuple[type[Element], Path, Any]] = [(root, (), data)]
    seen = {root}
    for element, path, value in waiting:  # grows on the way
        if key in element.model_fields:
            found.append(path)
        for name, info in element.model_fields.items():
            inner = _item(value, name)[1]
            for slot in slots_of(info.annotation, info.metadata):
                for element_below in slot.elements(inner):
                    if element_below not in seen:
                        seen.add(element_below)
                        waiting.append((element_below, (*path, name), inner))
    return found


def slots_of(annotation: Any, metadata: Any = ()) -> tuple[Slot, ...]:
    """What an annotation allows: unions and aliases taken apart, with the limits of each."""
    limits = tuple(_limits(metadata))
    for one in limits:
        if isinstance(one, OneOf):
            nothing = (Slot(types.NoneType),) if one.optional else ()
            return (Slot(one), *nothing)
    if hasattr(annotation, "__value__"):  # a `type` statement
        return slots_of(annotation.__value__, limits)
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return slots_of(inner, (*limits, *more))
    if origin in (Union, types.UnionType):
        return tuple(found for part in get_args(annotation) for found in slots_of(part, limits))
    return (Slot(annotation, limits),)


def slots_inside(annotation: Any, metadata: Any = ()) -> Iterator[Slot]:
    """What an annotation allows, at its place and as items of its lists and tables."""
    for slot in slots_of(annotation, metadata):
        yield slot
        for part in get_args(slot.type) if get_origin(slot.type) is not Literal else ():
            yield from slots_inside(part)


def _limits(metadata: Any) -> Iterator[Any]:
    for one in metadata:
        if isinstance(one, FieldInfo):
            yield from _limits(one.metadata)
        elif isinstance(one, GroupedMetadata):
            yield from _limits(one)
        else:
            yield one


def _member(family: type[Kinds], value: Any, key: str) -> tuple[type[Element], ...]:
    kind = value if isinstance(value, str) else family.default_kind or key
    if isinstance(value, dict):
        kind = value.get("kind", kind)
    member = family.members.get(kind) if isinstance(kind, str) else None
    return (member,) if member else ()


def _enter(slot: Slot, key: str | int, value: Any) -> tuple[Slot, ...]:
    """What may stand below a slot under a key."""
    for element in slot.elements(value):
        info = element.model_fields.get(str(key))
        return slots_of(info.annotation, info.metadata) if info else ()
    origin, args = get_origin(slot.type), get_args(slot.type)
    if not args:
        return ()
    if _is_table(slot.type):
        return tuple(replace(found, key=str(key)) for found in slots_of(args[1]))
    if not isinstance(key, int):
        return ()
    if origin is tuple and args[-1] is not ...:
        return slots_of(args[key]) if key < len(args) else ()
    return slots_of(args[0])


def _is_table(annotation: Any) -> bool:
    origin = get_origin(annotation)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _item(value: Any, key: str | int) -> tuple[bool, Any]:
    if isinstance(value, dict) and key in value:
        return True, value[key]
    if isinstance(value, list) and isinstance(key, int) and key < len(value):
        return True, value[key]
    return False, None
