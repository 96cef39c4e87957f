"""Turns the file of a spec, what it extends and overrides into data with the place of each key."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moegen.errors import Mark, Problem, SpecError
from moegen.spec.element import Path
from moegen.spec.extends import KEY, read_tree, root_mapping
from moegen.spec.overrides import override, sweep
from moegen.spec.tree import Marks, Tree, parse

__all__ = ["Marks", "Source", "locate", "read", "read_text", "sweep"]

SECTION = "model"


@dataclass(frozen=True)
class Source:
    """The data of a spec, where each key of it stands, and the files it was read from."""

    data: dict[str, Any]
    marks: Marks
    files: tuple[str, ...]


def read(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, default_section: str = SECTION
) -> Source:
    """Read a spec file, all that it extends, and then the overrides."""
    tree, files = read_tree(path)
    return _source(tree, files, overrides, default_section)


def read_text(
    text: str,
    name: str = "<text>",
    overrides: Sequence[str] = (),
    *,
    default_section: str = SECTION,
) -> Source:
    """Read a spec from a text, which cannot extend files, and then the overrides."""
    tree = parse(text.removeprefix("\ufeff"), name)
    if KEY in root_mapping(tree):
        mark = tree.marks[KEY,]
        raise SpecError(Problem("extends needs a spec that is a file", mark, (KEY,)))
    return _source(tree, (name,), overrides, default_section)


def locate(marks: Mapping[Path, Mark], path: Path) -> Mark | None:
    """The place of a path, or of the nearest section around it."""
    for length in range(len(path), -1, -1):
        if path[:length] in marks:
            return marks[path[:length]]
    return None


def _source(
    tree: Tree, files: tuple[str, ...], overrides: Sequence[str], default_section: str
) -> Source:
    tree = override(tree, overrides, default_section)
    return Source(tree.data, tree.marks, files)
