"""Turns overrides, texts like moe.experts=64, into values in the tree of a spec."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moegen.errors import Mark, Problem, SpecError, dotted
from moegen.spec.element import Element, Path
from moegen.spec.extends import KEY
from moegen.spec.forms import Slots, one_kind
from moegen.spec.merge import slots_at, without
from moegen.spec.shape import below
from moegen.spec.tree import Tree, parse
from moegen.spec.words import show

FILE = "-o"
LONGEST = 10_000  # characters of an override
MOST = 10_000  # combinations of a sweep
_INDEX = re.compile(r"0|[1-9][0-9]{0,5}")


def override(
    tree: Tree,
    overrides: Sequence[str],
    default_section: str,
    root: type[Element] | None = None,
) -> Tree:
    """The tree with some values replaced; all that is wrong is one SpecError.

    A section in an override replaces what stood there. A bare value that is short for a section
    sets that one field of a section of its kind: moe.experts=64 leaves the width as it is.
    """
    problems: list[Problem] = []
    for text in overrides:
        try:
            tree = _apply(tree, text, default_section, root)
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)
    return tree


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Each combination of the values in overrides such as moe.experts=8,16,32."""
    choices = []
    count = 1
    for text in overrides:
        path, equals, value = text.partition("=")
        choices.append([f"{path}{equals}{part}" for part in _parts(value)])
        count *= len(choices[-1])
        if count > MOST:
            raise SpecError(_problem(text, f"more than {MOST} combinations"))
    return [list(combination) for combination in itertools.product(*choices)]


def _parts(value: str) -> list[str]:
    """A value split at the commas that stand outside of brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for index, character in enumerate(value):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth <= 0:
            parts.append(value[start:index].strip())
            start = index + 1
    return [*parts, value[start:].strip()] if parts else [value]


def _apply(tree: Tree, text: str, default_section: str, root: type[Element] | None) -> Tree:
    path, value = _read(text)
    if path[0] not in tree.data and isinstance(tree.data.get(default_section), dict):
        # moe.experts means model.moe.experts: nearly all that one varies is below model.
        path = (default_section, *path) if path[0] in tree.data[default_section] else path
    path, data = _Put(text, value.data).put(tree.data, path, (), slots_at(root))
    marks = without(tree.marks, path)
    for length in range(1, len(path)):
        marks.setdefault(path[:length], value.marks[()])
    return Tree(data, {**marks, **{(*path, *below): m for below, m in value.marks.items()}})


def _read(text: str) -> tuple[Path, Tree]:
    """The path and the value of one override."""
    name, equals, value = text.partition("=")
    if len(text) > LONGEST:
        raise SpecError(_problem(text, f"an override has at most {LONGEST} characters"))
    if "\n" in text or "\r" in text:
        raise SpecError(_problem(text, "an override is one line"))
    if not equals:
        hint = "write a path and a value, as in moe.experts=64"
        raise SpecError(_problem(text, f"{show(text)} has no '='", hint))
    path: Path = tuple(part.strip() for part in name.split("."))
    if not all(path):
        raise SpecError(_problem(text, f"{show(name)} is not a path of keys", "as in moe.experts"))
    if path[0] == KEY:
        raise SpecError(_problem(text, f"{KEY} belongs in a file", "it cannot be overridden"))
    if not value.strip():
        raise SpecError(_problem(text, "the value is missing", "write null for no value"))
    whole = Mark(FILE, 1, 1, text)
    try:
        tree = parse(value, FILE)
    except SpecError as error:
        raise SpecError([_shifted(problem, text) for problem in error.problems]) from None
    return path, Tree(tree.data, dict.fromkeys(tree.marks, whole))


def _shifted(problem: Problem, text: str) -> Problem:
    """A problem of the value as one of the whole override."""
    column = problem.mark.column if problem.mark else 1
    mark = Mark(FILE, 1, text.index("=") + 1 + column, text)
    return Problem(problem.message, mark, (), problem.hint)


@dataclass(frozen=True)
class _Put:
    """An override as it is put into data: the text of all of it, and its value."""

    text: str
    value: Any

    def put(self, data: Any, path: Path, above: Path, slots: Slots) -> tuple[Path, Any]:
        """The data with the value at a path, and the path as the data has it."""
        if not path:
            return self.whole(data, above, slots)
        if data is not None and not isinstance(data, (dict, list)):
            data = self.section(data, path, above, slots)
        if isinstance(data, list):
            index = _index(data, str(path[0]), above, self.text)
            inner_slots = below(slots, index, data)
            full, inner = self.put(data[index], path[1:], (*above, index), inner_slots)
            return full, [*data[:index], inner, *data[index + 1 :]]
        key, data = path[0], data or {}
        inner_slots = below(slots, key, data)
        full, inner = self.put(data.get(key), path[1:], (*above, key), inner_slots)
        return full, {**data, key: inner}

    def whole(self, data: Any, above: Path, slots: Slots) -> tuple[Path, Any]:
        """The value in the place of the data, or in the field of it that it is short for."""
        pair = one_kind(slots, data, self.value) if not isinstance(self.value, dict) else None
        if pair is None:
            return above, self.value
        ((key, value),) = pair[1].items()
        inner_slots = below(slots, key, {**data, **pair[1]})
        full, inner = _Put(self.text, value).put(data.get(key), (), (*above, key), inner_slots)
        return full, {**data, key: inner}

    def section(self, data: Any, path: Path, above: Path, slots: Slots) -> dict[str, Any]:
        """The section that a single value is short for, if it is."""
        pair = one_kind(slots, data, {})
        if pair is not None:
            return pair[0]
        here = dotted(above)
        hint = f"replace it whole: {FILE} '{here}={{{dotted(path[:1])}: ..., ...}}'"
        message = f"{here} is {show(data)}, a single value with no keys below it"
        raise SpecError(_problem(self.text, message, hint))


def _index(items: list[Any], key: str, above: Path, text: str) -> int:
    if _INDEX.fullmatch(key) and int(key) < len(items):
        return int(key)
    count = f"{len(items)} items, counted from 0" if items else "no items"
    raise SpecError(_problem(text, f"{dotted(above)} is a list of {count}, not {show(key)}"))


def _problem(text: str, message: str, hint: str | None = None) -> Problem:
    return Problem(message, Mark(FILE, 1, 1, text.replace("\n", " ")), (), hint)
