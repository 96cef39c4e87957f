"""Turns YAML text into plain data and the place of every key in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from moegen.errors import Mark, Problem, SpecError
from moegen.spec.element import Path
from moegen.spec.scalars import Refused, resolve
from moegen.spec.scan import FORBIDDEN, character, check, events, place_of, split
from moegen.spec.words import show

Marks = dict[Path, Mark]


@dataclass(frozen=True)
class Tree:
    """The data of one text and where each of its keys and items stands."""

    data: Any
    marks: Marks


def parse(text: str, name: str) -> Tree:
    """The data of one YAML document; all that is wrong with it is one SpecError."""
    check(text, name)
    builder = _Builder(name, split(text), events(text, name))
    data = builder.document()
    if builder.problems:
        raise SpecError(builder.problems)
    return Tree(data, builder.marks)


@dataclass
class _Builder:
    name: str
    lines: list[str]
    events: Iterator[Any]
    marks: Marks = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def document(self) -> Any:
        data: Any = None
        self.marks[()] = Mark(self.name, 1, 1, self.lines[0])
        documents = 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if event.tags:
                    self.refuse(event, "tags are not read in a spec", "remove the %TAG line")
                if documents > 1:
                    self.refuse(event, "a second document starts here", "a spec is one document")
                    break
            elif isinstance(event, yaml.NodeEvent):
                self.marks[()] = self.mark(event)
                data = self.node(event, ())
        return data

    def node(self, event: Any, path: Path) -> Any:
        """The value that starts with an event; recursion ends at the depth of `events`."""
        if isinstance(event, yaml.AliasEvent):
            hint = "write the value out, or use extends"
            self.refuse(
                event, f"aliases (*{_cut(event.anchor)}) are not read in a spec", hint, path
            )
            return None
        if event.anchor is not None:
            hint = "write values out where they are used, or use extends"
            self.refuse(
                event, f"anchors (&{_cut(event.anchor)}) are not read in a spec", hint, path
            )
        if event.tag is not None:
            self.refuse(
                event, f"tags ({_cut(event.tag)}) are not read in a spec", "remove it", path
            )
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path)
        return self.mapping(path)

    def scalar(self, event: Any, path: Path) -> Any:
        found = FORBIDDEN.search(event.value)
        if found:
            self.refuse(event, f"{character(found[0])} is not allowed in a spec", None, path)
            return None
        if not event.implicit[0]:
            return event.value
        try:
            return resolve(event.value)
        except Refused as refused:
            self.refuse(event, refused.message, refused.hint, path)
            return None

    def sequence(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            below = (*path, len(items))
            self.marks[below] = self.mark(event)
            items.append(self.node(event, below))
        return items

    def mapping(self, path: Path) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event, path)
            if key is None or self.is_twice(event, key, items, path):
                self.skip(next(self.events))
                continue
            below: Path = (*path, key)
            self.marks[below] = self.mark(event)
            items[key] = self.node(next(self.events), below)
        return items

    def key(self, event: Any, path: Path) -> str | None:
        if not isinstance(event, yaml.ScalarEvent):
            if isinstance(event, yaml.AliasEvent):
                self.node(event, path)
            else:
                self.refuse(event, "a key is text, not a section or a list", None, path)
                self.skip(event)
            return None
        before = len(self.problems)
        key: Any = self.node(event, path)
        if len(self.problems) > before:
            return None
        if event.implicit[0] and event.value == "<<":
            message = "merge keys ('<<') are not read in a spec"
            self.refuse(event, message, "write the keys out, or use extends", path)
            return None
        if not isinstance(key, str):
            hint = f'write "{_cut(event.value)}"' if event.value else None
            self.refuse(event, f"a key is text, not {show(key)}", hint, path)
            return None
        return key

    def is_twice(self, event: Any, key: str, items: dict[str, Any], path: Path) -> bool:
        if key not in items:
            return False
        first = self.marks[*path, key].line
        message = f"key {show(key)} is given twice, first at line {first}"
        self.refuse(event, message, None, (*path, key))
        return True

    def skip(self, event: Any) -> None:
        """Pass over a whole value."""
        depth = 0
        while True:
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth == 0:
                return
            event = next(self.events)

    def mark(self, event: Any) -> Mark:
        return place_of(event.start_mark, self.lines, self.name)

    def refuse(self, event: Any, message: str, hint: str | None, path: Path = ()) -> None:
        self.problems.append(Problem(message, self.mark(event), path, hint))


def _cut(name: str | None) -> str:
    name = name or ""
    return name if len(name) <= 40 else f"{name[:37]}..."
