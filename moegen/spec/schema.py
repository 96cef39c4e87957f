"""Turns elements, and the kinds registered for them, into the JSON Schema that editors use."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic.json_schema import models_json_schema

from moegen.spec.element import FAMILY, Element, Kinds, OneOf, family_key, short_form
from moegen.spec.extends import KEY
from moegen.spec.partial import with_presets
from moegen.spec.shape import slots_inside

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_ELEMENT = Element.__doc__
Schema = dict[str, Any]


def json_schema(root: type[Element]) -> Schema:
    """The JSON Schema of a spec whose top level is this element."""
    elements, families = _reach(root)
    refs, whole = models_json_schema([(one, "validation") for one in elements])
    definitions = {name: _plain(body) for name, body in whole.get("$defs", {}).items()}
    names = {family_key(family): _free(family.__name__, definitions) for family in families}
    for family in families:
        members = {kind: refs[member, "validation"] for kind, member in family.members.items()}
        definitions[names[family_key(family)]] = _family(family, members, definitions)
    top = _top(definitions, refs[root, "validation"])
    if refs[root, "validation"] not in _refs(definitions):
        del definitions[_name(refs[root, "validation"])]
    return with_presets(
        {
            "$schema": DIALECT,
            "title": root.__name__,
            **_described(root),
            **_pointed(top, names),
            "$defs": {name: _pointed(definitions[name], names) for name in sorted(definitions)},
        }
    )


def _reach(root: type[Element]) -> tuple[list[type[Element]], list[type[Kinds]]]:
    """Every element below the root, and every family that parts are chosen from."""
    elements: list[type[Element]] = [root]
    families: list[type[Kinds]] = []
    for element in elements:  # grows on the way
        for info in element.model_fields.values():
            for slot in slots_inside(info.annotation, info.metadata):
                below: list[type[Element]] = []
                if isinstance(slot.type, OneOf):
                    families += [f for f in (slot.type.family,) if f not in families]
                    below = list(slot.type.family.members.values())
                elif isinstance(slot.type, type) and issubclass(slot.type, Element):
                    below = [slot.type]
                elements += [one for one in dict.fromkeys(below) if one not in elements]
    return elements, families


def _family(family: type[Kinds], members: dict[str, Schema], definitions: Schema) -> Schema:
    options: list[Schema] = [{"enum": sorted(members)}]
    for kind, ref in sorted(members.items()):
        needed = {} if kind == family.default_kind else {"required": ["kind"]}
        options.append({**ref, **needed})
    default = family.members.get(family.default_kind or "")
    if default is not None and default.shorthand:
        body = definitions[_name(members[family.default_kind or ""])]
        options.append(short_form(body["properties"][default.shorthand]))
    return {"title": family.__name__, **_described(family), "anyOf": options}


def _free(name: str, definitions: Schema) -> str:
    return _free(f"{name}Kind", definitions) if name in definitions else name


def _top(definitions: Schema, ref: Schema) -> Schema:
    """The schema of the whole file, which may also extend others and then lack what they have."""
    body = dict(definitions[_name(ref)])
    for key in ("title", "description"):
        body.pop(key, None)
    if needed := body.pop("required", None):
        body["anyOf"] = [{"required": needed}, {"required": [KEY]}]
    file = {"type": "string", "pattern": r"\.ya?ml$"}
    extends = {
        "description": "Files that this spec starts from, relative to it; later ones win.",
        "anyOf": [file, {"type": "array", "items": file}],
    }
    return {**body, "properties": {KEY: extends, **body.get("properties", {})}}


def _refs(body: Any) -> list[Schema]:
    """Every reference in a schema."""
    parts = body.values() if isinstance(body, dict) else body if isinstance(body, list) else ()
    found = [ref for part in parts for ref in _refs(part)]
    return [{"$ref": body["$ref"]}, *found] if isinstance(body, dict) and "$ref" in body else found


def _name(ref: Schema) -> str:
    return str(ref["$ref"].split("/")[-1])


def _described(element: type[Element]) -> Schema:
    told = inspect.cleandoc(element.__doc__ or "")
    return {"description": told} if told and element.__doc__ != _ELEMENT else {}


def _plain(body: Any, *, is_table: bool = False) -> Any:
    """A schema without the title that pydantic gives each field, which is its name again."""
    if isinstance(body, list):
        return [_plain(one) for one in body]
    if not isinstance(body, dict):
        return body
    found = {key: _plain(value, is_table=key == "properties") for key, value in body.items()}
    if is_table:
        for field in found.values():
            field.pop("title", None)
    return found


def _pointed(body: Any, names: dict[str, str]) -> Any:
    """A schema in which each mention of a family points to its definition."""
    if isinstance(body, list):
        return [_pointed(one, names) for one in body]
    if not isinstance(body, dict):
        return body
    found = {key: _pointed(value, names) for key, value in body.items() if key != FAMILY}
    return {"$ref": f"#/$defs/{names[body[FAMILY]]}", **found} if FAMILY in body else found
