"""Turns the source of a spec into a validated element, or into every problem it has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from moegen.errors import Mark, Problem, SpecError
from moegen.spec.dump import resolved_yaml
from moegen.spec.element import Element, Path
from moegen.spec.explain import explain
from moegen.spec.source import Marks, Source, locate, read

__all__ = ["Loaded", "load", "load_file", "resolved_yaml"]

E = TypeVar("E", bound=Element)


@dataclass(frozen=True)
class Loaded(Generic[E]):
    """A validated spec with the data it was read from, and where each key of it stands."""

    spec: E
    data: dict[str, Any]
    marks: Marks
    files: tuple[str, ...]

    def mark(self, path: Path) -> Mark | None:
        """The place of a path, or of the nearest section around it."""
        return locate(self.marks, path)

    def problem(
        self, path: Path, message: str, hint: str | None = None, note: str | None = None
    ) -> Problem:
        """A problem with what stands at a path."""
        return Problem(message, self.mark(path), path, hint, note)


def load(root: type[E], source: Source) -> E:
    """The element that a source describes; all that is wrong with it is one SpecError."""
    try:
        return root.model_validate(source.data)
    except ValidationError as error:
        problems = explain(root, source, error)
    raise SpecError(problems)


def load_file(
    root: type[E], path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> Loaded[E]:
    """Read, override and validate a spec file, and keep where everything stands."""
    source = read(path, overrides, root=root)
    return Loaded(load(root, source), source.data, source.marks, source.files)
