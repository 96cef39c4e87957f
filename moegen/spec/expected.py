"""Turns what may stand at a place into plain words: a whole number of at least 1."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence, Set
from enum import Enum
from typing import Any, Literal, get_args, get_origin

from moegen.spec.element import Element, OneOf
from moegen.spec.scalars import boolean_hint, number_hint
from moegen.spec.shape import Slot, slots_of
from moegen.spec.words import article, listed, nearest, show

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
}


def expected(slots: Sequence[Slot]) -> str:
    """What is expected, in words; empty if there are none for it."""
    words = dict.fromkeys(_words(slot) for slot in slots if get_origin(slot.type) is not Literal)
    options = [show(choice) for choice in choices(slots)]
    if options:
        words[f"one of {listed(options)}" if len(options) > 2 else listed(options)] = None
    return "" if "" in words else listed(words)


def choices(slots: Iterable[Slot]) -> list[Any]:
    """The values that literals and enumerations allow."""
    found: list[Any] = []
    for slot in slots:
        if get_origin(slot.type) is Literal:
            found += get_args(slot.type)
        elif isinstance(slot.type, type) and issubclass(slot.type, Enum):
            found += [member.value for member in slot.type]
    return list(dict.fromkeys(found))


def advice(value: Any, slots: Sequence[Slot]) -> str | None:
    """What to write instead of a value that is not among what is expected."""
    allowed = {slot.type for slot in slots if isinstance(slot.type, type)}
    if isinstance(value, str):
        return _text_advice(value, slots, allowed)
    if isinstance(value, float) and int in allowed and value.is_integer() and abs(value) < 1e15:
        return f"write {int(value)}"
    if isinstance(value, (bool, int, float)) and str in allowed:
        return f'write "{show(value)}"'
    return None


def _text_advice(text: str, slots: Sequence[Slot], allowed: set[Any]) -> str | None:
    options = [str(choice) for choice in choices(slots) if isinstance(choice, str)]
    best = nearest(text, options)
    if best:
        return f"did you mean {best!r}?"
    if bool in allowed and (hint := boolean_hint(text)):
        return hint
    if types.NoneType in allowed and text.strip().lower() in ("none", "null", "nil", "~"):
        return "write null"
    if allowed & {int, float}:
        return number_hint(text, whole=float not in allowed)
    return None


def _words(slot: Slot) -> str:
    """One slot in words; empty if there are none."""
    kind = slot.type
    if kind in _WORDS:
        return _WORDS[kind] + _limits(kind, slot.limits)
    if isinstance(kind, OneOf):
        return f"{article(kind.family.family())} (a name or a section)"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return listed(show(member.value) for member in kind)
    if isinstance(kind, type) and issubclass(kind, Element):
        return _element_words(kind)
    origin = get_origin(kind) or kind
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a section"
    if isinstance(origin, type) and issubclass(origin, (Sequence, Set)):
        return "a list" + _lengths("entries", slot.limits)
    return ""


def _element_words(element: type[Element]) -> str:
    if element.shorthand is None:
        return "a section"
    info = element.model_fields[element.shorthand]
    short = expected(slots_of(info.annotation, info.metadata))
    return f"{short} or a section" if short else "a section"


def _limits(kind: Any, limits: Iterable[Any]) -> str:
    if kind is str:
        return _lengths("characters", limits)
    if kind in (bool, types.NoneType):
        return ""
    bounds = {
        name: _round(getattr(one, name))
        for one in limits
        for name in ("ge", "gt", "le", "lt", "multiple_of")
        if getattr(one, name, None) is not None
    }
    if kind is int and "gt" in bounds:
        bounds["ge"] = bounds.pop("gt") + 1
    if {"ge", "le"} <= bounds.keys():
        return f" from {bounds['ge']} to {bounds['le']}"
    phrases = [("ge", "of at least"), ("gt", "above"), ("le", "of at most"), ("lt", "below")]
    phrases.append(("multiple_of", "divisible by"))
    parts = [f"{phrase} {bounds[name]}" for name, phrase in phrases if name in bounds]
    return f" {' and '.join(parts)}".replace(" and of ", " and ") if parts else ""


def _round(bound: Any) -> Any:
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound


def _lengths(what: str, limits: Iterable[Any]) -> str:
    parts = []
    for one in limits:
        if getattr(one, "min_length", None):
            parts.append(f"at least {one.min_length}")
        if getattr(one, "max_length", None) is not None:
            parts.append(f"at most {one.max_length}")
        if getattr(one, "pattern", None):
            return f" that matches {one.pattern}"
    return f" of {' and '.join(parts)} {what}" if parts else ""
