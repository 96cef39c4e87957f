"""Tells what a bare value is short for at its place, and whether two values are of one kind."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

from moegen.spec.element import OneOf
from moegen.spec.expected import choices
from moegen.spec.shape import Slot, slots_of

Slots = Sequence[Slot]


def long_form(slots: Slots, value: Any) -> dict[str, Any] | None:
    """The section that a bare value stands for; None if it stands for itself, or for nothing.

    So `64` is `{count: 64}` where experts stand, and `sigmoid` is `{kind: sigmoid}` where an
    affinity does. 0, false, none and null mean that there is no such part.
    """
    sections = [slot for slot in slots if slot.type is not types.NoneType]
    if isinstance(value, (dict, list)) or len(sections) != 1:
        return None
    (slot,) = sections
    is_nothing = not value or value == "none"
    if isinstance(slot.type, OneOf):
        return None if is_nothing or isinstance(value, bool) else _of_family(slot, value)
    for element in slot.elements(value):
        if element.shorthand is None:
            return None
        info = element.model_fields[element.shorthand]
        if is_nothing and value not in choices(slots_of(info.annotation, info.metadata)):
            return None
        return None if is_nothing and len(slots) > 1 else {element.shorthand: value}
    return None


def one_kind(slots: Slots, base: Any, over: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """A value and one that is laid over it as two sections of one kind; None if they are not.

    The keys of one kind mean nothing to another. A base without a kind is of the default one; a
    section without a kind, laid over another, means that one's.
    """
    if not isinstance(base, dict) and not isinstance(over, dict):
        return None
    below, above = (v if isinstance(v, dict) else long_form(slots, v) for v in (base, over))
    if below is None or above is None:
        return None
    known = below.get("kind", _default(slots))
    if "kind" in above and known is not None and above["kind"] != known:
        return None
    return _told(base, below), _told(over, above)


def _told(value: Any, section: dict[str, Any]) -> dict[str, Any]:
    """A section without the kind that a number implies."""
    is_number = isinstance(value, (int, float))
    return {k: v for k, v in section.items() if k != "kind"} if is_number else section


def _default(slots: Slots) -> str | None:
    """The kind of a section that names none."""
    found = (s.type.family.default_kind or s.key for s in slots if isinstance(s.type, OneOf))
    return next(found, None) or None


def _of_family(slot: Slot, value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        return {"kind": value}
    for member in slot.elements(value):
        if member.shorthand:
            return {"kind": _default([slot]), member.shorthand: value}
    return None
