"""Lets sections of a JSON Schema name presets, and then lack what the preset may give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moegen.spec import presets
from moegen.spec.expand import KEY

Schema = dict[str, Any]
_DEFS = "#/$defs/"
_ABOUT = "what this section starts from; what is written here wins"


def with_presets(schema: Schema) -> Schema:
    """The schema in which each section that has presets is complete, or names one.

    A section that names one is made of definitions of its own, in which nothing is required.
    """
    definitions: dict[str, Schema] = schema["$defs"]
    partial: dict[str, Schema] = {}
    choices: list[tuple[Schema, str, Schema]] = []
    for table in [body["properties"] for body in _bodies(schema) if "properties" in body]:
        for section in [one for one in presets.sections() if one in table]:
            over = _partial(table[section], definitions, partial)
            objects = list(_objects(over, partial))
            for body in objects:
                _allow(body, presets.names(section))
            choices += [(table, section, over)] if objects else []
    for table, section, over in choices:
        table[section] = _either(table[section], over)
    return {**schema, "$defs": dict(sorted({**definitions, **partial}.items()))}


def _allow(body: Schema, names: list[str]) -> None:
    """Let an object name one of some presets, beside those that it may name already."""
    known = set(body["properties"].get(KEY, {}).get("enum", ())) - {"none", None}
    options = [*sorted(known | set(names)), "none", None]
    body["properties"] = {**body["properties"], KEY: {"description": _ABOUT, "enum": options}}


def _either(whole: Schema, over: Schema) -> Schema:
    """A section in whole, or over a preset."""
    told = {key: value for key, value in whole.items() if key in ("description", "default")}
    first, second = ({k: v for k, v in one.items() if k not in told} for one in (whole, over))
    return {"anyOf": [first, {**second, "required": [KEY]}], **told}


def _partial(body: Any, definitions: dict[str, Schema], partial: dict[str, Schema]) -> Any:
    """A copy of a schema that requires nothing; what it points to is copied as well."""
    if isinstance(body, list):
        return [_partial(one, definitions, partial) for one in body]
    if not isinstance(body, dict):
        return body
    kept = {k: v for k, v in body.items() if k != "required" or not isinstance(v, list)}
    found = {key: _partial(value, definitions, partial) for key, value in kept.items()}
    if "$ref" in found:
        name = found["$ref"].removeprefix(_DEFS)
        copy = f"Partial{name}"
        if copy not in partial:
            partial[copy] = {}  # it may point to itself
            partial[copy].update(_partial(definitions[name], definitions, partial))
        found["$ref"] = f"{_DEFS}{copy}"
    return found


def _objects(body: Schema, definitions: dict[str, Schema]) -> Iterator[Schema]:
    """The objects that may stand where a schema does, those of a family each."""
    if "$ref" in body:
        yield from _objects(definitions[body["$ref"].removeprefix(_DEFS)], definitions)
    elif "properties" in body:
        yield body
    for option in body.get("anyOf", ()):
        yield from _objects(option, definitions)


def _bodies(body: Any) -> Iterator[Schema]:
    """Every schema inside a schema."""
    parts = body.values() if isinstance(body, dict) else body if isinstance(body, list) else ()
    for part in parts:
        yield from _bodies(part)
    if isinstance(body, dict):
        yield body
