"""Turns a base tree and the tree that is laid over it into one; each value keeps its own place."""

from __future__ import annotations

from typing import Any

from moegen.spec.element import Element, Path
from moegen.spec.forms import Slots, one_kind
from moegen.spec.shape import Slot, below
from moegen.spec.tree import Marks, Tree


def merge(base: Tree, over: Tree, root: type[Element] | None = None) -> Tree:
    """One tree over another; `root` is what they are trees of, if that is known.

    Mappings are merged deeply; lists, scalars and mappings of another kind are replaced. Where
    elements are known, a bare value that is short for a section counts as that section.
    """
    marks = dict(over.marks)
    return Tree(lay(base, over.data, marks, (), slots_at(root)), marks)


def slots_at(root: type[Element] | None) -> Slots:
    """What may stand at the top level of a spec."""
    return (Slot(root),) if root else ()


def lay(base: Tree, over: Any, marks: Marks, path: Path, slots: Slots) -> Any:
    """The data of a base with other data laid over it, both at a path.

    marks: those of the data that is laid over; the places that remain of the base are added.
    """
    replaced: set[Path] = set()
    data = _Laying(base.marks, marks, replaced).lay(base.data, over, path, slots)
    for at, mark in base.marks.items():
        if not _below(at, replaced):
            marks.setdefault(at, mark)
    return data


def without(marks: Marks, path: Path) -> Marks:
    """The marks but for those below a path."""
    return {at: mark for at, mark in marks.items() if at[: len(path)] != path or at == path}


class _Laying:
    def __init__(self, base: Marks, marks: Marks, replaced: set[Path]) -> None:
        self.base = base
        self.marks = marks
        self.replaced = replaced

    def lay(self, base: Any, over: Any, path: Path, slots: Slots) -> Any:
        pair = one_kind(slots, base, over)
        if pair is None:
            self.replaced.add(path)
            return over
        for value, section, marks in zip((base, over), pair, (self.base, self.marks), strict=True):
            if value is not section:
                self.place(section, path, marks)
        merged = dict(pair[0])
        kind = {**pair[0], **pair[1]}
        for key, value in pair[1].items():
            at = (*path, key)
            inner = below(slots, key, kind)
            merged[key] = self.lay(merged[key], value, at, inner) if key in merged else value
        return merged

    def place(self, section: dict[str, Any], path: Path, marks: Marks) -> None:
        """Let the keys of a section that was written in short stand where that stands."""
        for key in section if path in marks else ():
            self.marks.setdefault((*path, key), marks[path])


def _below(path: Path, replaced: set[Path]) -> bool:
    return any(path[:length] in replaced for length in range(len(path) + 1))
