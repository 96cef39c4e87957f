"""What a routed layer can be made of: every part, its kinds and their fields, and the presets.

Read off the registered elements, so that those of plug-ins are there too.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moegen.arch.account import ORDER
from moegen.arch.moe import MoE
from moegen.arch.routing.router import Router
from moegen.errors import MoegenError, Problem
from moegen.spec import presets
from moegen.spec.element import Element, Kinds, OneOf
from moegen.spec.expected import choices, expected
from moegen.spec.shape import Slot, slots_inside, slots_of
from moegen.spec.words import nearest

SECTION = "moe"  # of the spec, and of presets


@dataclass(frozen=True)
class Part:
    """A section of a routed layer: its place below `moe`, what it is for, what it may be."""

    path: tuple[str, ...]
    purpose: str
    family: type[Kinds] | None
    elements: tuple[type[Element], ...]

    @property
    def name(self) -> str:
        """The place with dots; `moe` for the layer itself."""
        return ".".join(self.path) or SECTION


def parts() -> list[Part]:
    """Every part in a token's order, what is inside another after it."""
    found = [Part((), "the layer itself", None, (MoE,))]
    for section in ORDER:
        _enter(MoE, section, (), found)
    return found


def kind_of(element: type[Element]) -> str | None:
    """What specs call a member of a family."""
    return str(element.model_fields["kind"].default) if issubclass(element, Kinds) else None


def fields_of(element: type[Element]) -> dict[str, FieldInfo]:
    """The fields that a section of this element may have, those that are parts left out."""
    return {
        name: info
        for name, info in element.model_fields.items()
        if name != "kind" and not (element in (MoE, Router) and _holds(info))
    }


def default_of(info: FieldInfo) -> Any:
    """The default as a spec would have it: a kind's name for a part."""
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return getattr(value, "kind", None) or value.model_dump(exclude_unset=True)
    return list(value) if isinstance(value, tuple) else value


def options_of(info: FieldInfo) -> list[Any]:
    """The words that a field may be."""
    return choices(slots_of(info.annotation, info.metadata))


def about(element: type[Element]) -> str:
    """All that its docstring says."""
    return inspect.getdoc(element) or ""


def find(name: str) -> tuple[list[Part], list[str]]:
    """The parts (with the kinds that are meant) and presets of a name; a MoegenError if none."""
    known = parts()
    found = [part for part in known if name in _names(part)]
    for part in known:
        kinds = tuple(e for e in part.elements if _is_kind(part, e, name))
        if kinds:
            found.append(Part(part.path, part.purpose, part.family, kinds))
    named = [preset for preset in presets.names(SECTION) if preset == name]
    if not found and not named:
        raise MoegenError(_unknown(name, known))
    return found, named


def users(part: Part, element: type[Element]) -> list[str]:
    """Presets that name a kind in this part."""
    found = []
    for preset in presets.names(SECTION):
        value: Any = presets.read(SECTION, preset).data
        for key in part.path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, dict):
            value = value if part.path == ("losses",) else value.get("kind")
        kind = kind_of(element)
        if value == kind or (isinstance(value, dict) and kind in value):
            found.append(preset)
    return found


def facts(name: str | None) -> dict[str, Any]:
    """All of it as `moegen routing --json` prints it, or what is meant by a name."""
    found, named = find(name) if name else (parts(), presets.names(SECTION))
    return {
        "parts": [
            {
                "part": part.name,
                "purpose": part.purpose,
                "family": part.family.family() if part.family else None,
                "default": part.family.default_kind if part.family else None,
                "kinds": [_kind_facts(element) for element in part.elements],
            }
            for part in found
        ],
        "presets": [
            {
                "name": preset,
                **presets.about(SECTION, preset).model_dump(),
                **({"yaml": presets.text(SECTION, preset)} if name else {}),
            }
            for preset in named
        ],
    }


def _kind_facts(element: type[Element]) -> dict[str, Any]:
    return {
        "kind": kind_of(element),
        "summary": element.summary(),
        "about": about(element),
        "fields": [
            {
                "name": name,
                "required": info.is_required(),
                "default": None if info.is_required() else default_of(info),
                "expects": expected(slots_of(info.annotation, info.metadata)),
                "description": info.description,
            }
            for name, info in fields_of(element).items()
        ],
    }


def _enter(element: type[Element], name: str, path: tuple[str, ...], found: list[Part]) -> None:
    """Append the part that a field of an element is, and those inside it, each class once."""
    info = element.model_fields[name]
    path = (*path, name)
    for slot in slots_inside(info.annotation, info.metadata):
        family, elements = _meant(slot)
        if not elements or any(part.elements == elements for part in found):
            continue
        if elements != (Router,):
            found.append(Part(path, info.description or "", family, elements))
        elif path != ("router",):  # inside experts: the same parts again
            continue
        for one in elements:
            for inner in one.model_fields:
                _enter(one, inner, path, found)


def _meant(slot: Slot) -> tuple[type[Kinds] | None, tuple[type[Element], ...]]:
    if isinstance(slot.type, OneOf):
        family = slot.type.family
        members = sorted(family.members, key=lambda kind: (kind != family.default_kind, kind))
        return family, tuple(family.members[kind] for kind in members)
    if isinstance(slot.type, type) and issubclass(slot.type, Element):
        return None, (slot.type,)
    return None, ()


def _holds(info: FieldInfo) -> bool:
    """Whether a field is a part of its own."""
    return any(_meant(slot)[1] for slot in slots_inside(info.annotation, info.metadata))


def _names(part: Part) -> set[str]:
    """What a part may be called: router.select.second, select.second, second."""
    return {".".join(part.path[start:]) for start in range(len(part.path))} or {SECTION}


def _is_kind(part: Part, element: type[Element], name: str) -> bool:
    """Whether a name means a kind: cosine, score.cosine, router.score.cosine."""
    kind = kind_of(element)
    return kind is not None and name in {kind, *(f"{one}.{kind}" for one in _names(part))}


def _unknown(name: str, known: list[Part]) -> Problem:
    words = {one for part in known for one in (part.name, part.path[-1] if part.path else SECTION)}
    words |= {kind for part in known for e in part.elements if (kind := kind_of(e))}
    near = nearest(name, [*words, *presets.names(SECTION)])
    return Problem(
        f"no part of a router and no preset is called {name[:60]!r}",
        hint=f"did you mean {near!r}?" if near else None,
        note="`moegen routing` lists all of them",
    )


def example(info: FieldInfo) -> Any:
    """A value that a required field may have."""
    if info.examples:
        return info.examples[0]
    for slot in slots_of(info.annotation, info.metadata):
        if get_origin(slot.type) is Literal:
            return get_args(slot.type)[0]
        bounds = [getattr(limit, "ge", None) or getattr(limit, "gt", None) for limit in slot.limits]
        least = next((bound for bound in bounds if bound is not None), 0)
        if slot.type in (int, float):
            return slot.type(least + 1 if slot.type is float or not least else least)
        if slot.type is str:
            return "text"
    return []
