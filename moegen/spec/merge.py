"""Turns a base tree and the tree that extends it into one; each value keeps its own place."""

from __future__ import annotations

from typing import Any

from moegen.spec.element import Path
from moegen.spec.tree import Marks, Tree


def merge(base: Tree, child: Tree) -> Tree:
    """Mappings are merged deeply; lists, scalars and mappings of another kind are replaced."""
    marks = dict(base.marks)
    replaced: set[Path] = set()
    data = _merged(base.data, child.data, (), replaced)
    if replaced:
        marks = {path: mark for path, mark in marks.items() if not _below(path, replaced)}
    return Tree(data, {**marks, **child.marks})


def without(marks: Marks, path: Path) -> Marks:
    """The marks but for those below a path."""
    return {at: mark for at, mark in marks.items() if at[: len(path)] != path or at == path}


def _merged(base: Any, child: Any, path: Path, replaced: set[Path]) -> Any:
    if not isinstance(base, dict) or not isinstance(child, dict) or _other_kind(base, child):
        replaced.add(path)
        return child
    merged = dict(base)
    for key, value in child.items():
        below = (*path, key)
        merged[key] = _merged(base[key], value, below, replaced) if key in base else value
    return merged


def _other_kind(base: dict[str, Any], child: dict[str, Any]) -> bool:
    # The keys of one kind mean nothing to another.
    return "kind" in base and "kind" in child and base["kind"] != child["kind"]


def _below(path: Path, replaced: set[Path]) -> bool:
    return any(path[:length] in replaced for length in range(len(path) + 1))
