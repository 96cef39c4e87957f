"""Turns a spec file, its bases, overrides and presets into data with the place of each key."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moegen.errors import Mark, Problem, SpecError
from moegen.spec.element import Element, Path
from moegen.spec.expand import expand
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
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    default_section: str = SECTION,
    root: type[Element] | None = None,
) -> Source:
    """Read a spec file, all that it extends, then the overrides, then the presets it names.

    root: the element that the spec is read for, whose short forms and kinds are minded.
    """
    tree, files = read_tree(path, root)
    return _source(tree, files, overrides, default_section, root)


def read_text(
    text: str,
    name: str = "<text>",
    overrides: Sequence[str] = (),
    *,
    default_section: str = SECTION,
    root: type[Element] | None = None,
) -> Source:
    """Read a spec from a text, which cannot extend files; all else is as for a file."""
    tree = parse(text.removeprefix("\ufeff"), name)
    if KEY in root_mapping(tree):
        mark = tree.marks[KEY,]
        raise SpecError(Problem("extends needs a spec that is a file", mark, (KEY,)))
    return _source(tree, (name,), overrides, default_section, root)


def locate(marks: Mapping[Path, Mark], path: Path) -> Mark | None:
    """The place of a path, or of the nearest section around it."""
    for length in range(len(path), -1, -1):
        if path[:length] in marks:
            return marks[path[:length]]
    return None


def _source(
    tree: Tree,
    files: tuple[str, ...],
    overrides: Sequence[str],
    default_section: str,
    root: type[Element] | None,
) -> Source:
    tree = override(tree, overrides, default_section, root)
    tree = expand(tree, root)
    return Source(tree.data, tree.marks, files)
