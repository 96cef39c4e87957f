"""Lays each section that names a preset over that preset, so that no preset is left to name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moegen.errors import Mark, Problem, SpecError
from moegen.spec import presets
from moegen.spec.element import Element, Path
from moegen.spec.forms import Slots
from moegen.spec.merge import lay, slots_at
from moegen.spec.shape import below
from moegen.spec.tree import Marks, Tree
from moegen.spec.words import listed, show

KEY = "preset"
DEPTH = 8
MOST = 256  # presets that one spec may name, in all


def expand(tree: Tree, root: type[Element] | None = None) -> Tree:
    """The tree with the values of its presets below its own; all that is wrong is one SpecError."""
    if not any(path[-1:] == (KEY,) for path in tree.marks):
        return tree
    work = _Work(dict(tree.marks))
    data = work.expanded(tree.data, (), slots_at(root))
    if work.problems:
        raise SpecError(work.problems)
    return Tree(data, work.marks)


@dataclass
class _Work:
    """One tree that is being expanded: a spec's, or that of a preset at its path in the spec."""

    marks: Marks
    chain: tuple[str, ...] = ()  # section/name of the presets that are being read
    problems: list[Problem] = field(default_factory=list)
    asked: list[Path] = field(default_factory=list)

    def expanded(self, value: Any, path: Path, slots: Slots) -> Any:
        """A value without presets, those inside of it first: they are nearer to their values."""
        if isinstance(value, list):
            return [self._inside(value, index, path, slots) for index in range(len(value))]
        if not isinstance(value, dict):
            return value
        own = {key: self._inside(value, key, path, slots) for key in value if key != KEY}
        if KEY not in value:
            return own
        base = self._preset(value[KEY], path, slots)
        del self.marks[*path, KEY]
        return lay(base, own, self.marks, path, slots) if base else own

    def _inside(self, value: Any, key: str | int, path: Path, slots: Slots) -> Any:
        return self.expanded(value[key], (*path, key), below(slots, key, value))

    def _preset(self, name: Any, path: Path, slots: Slots) -> Tree | None:
        """The tree of the preset that a section names, at the section's path, if it names one."""
        at = (*path, KEY)
        section = next((key for key in reversed(path) if isinstance(key, str)), "")
        self.asked.append(at)
        if len(self.asked) > MOST + 1:
            return None
        try:
            if not self._is_named(section, name, self.marks[at], at):
                return None
            tree = presets.read(section, name, self.marks[at], at)
        except SpecError as error:
            self.problems += error.problems
            return None
        marks = {(*path, *inner): mark for inner, mark in tree.marks.items()}
        chain = (*self.chain, f"{section}/{name}")
        work = _Work(marks, chain, self.problems, self.asked)
        return Tree(work.expanded(tree.data, path, slots), marks)

    def _is_named(self, section: str, name: Any, mark: Mark, at: Path) -> bool:
        """Whether a section names a preset, and not none."""

        def refuse(message: str, hint: str | None = None) -> SpecError:
            return SpecError(Problem(message, mark, at, hint))

        if len(self.asked) > MOST:
            raise refuse(f"a spec names at most {MOST} presets")
        if not presets.names(section):
            hint = f"presets are for {listed(presets.sections(), 'and')}"
            raise refuse(f"unknown key {KEY!r} here", hint)
        if name is None or name == "none":
            return False
        if not isinstance(name, str):
            raise refuse(f"{KEY} is the name of one, not {show(name)}")
        if (one := f"{section}/{name}") in self.chain:
            circle = (*self.chain[self.chain.index(one) :], one)
            raise refuse(f"presets go in a circle: {' -> '.join(circle)}")
        if len(self.chain) == DEPTH:
            raise refuse(f"presets are more than {DEPTH} deep")
        return True
