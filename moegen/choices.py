"""Names that a user chooses from: the known ones, or an error that says which there are."""

from __future__ import annotations

from collections.abc import Iterable

from moegen.errors import MoegenError, Problem
from moegen.spec.words import nearest


def choose(what: str, name: str, known: Iterable[str]) -> str:
    """The name itself if it is known, else a MoegenError with the nearest and all known names."""
    names = list(known)
    if name in names:
        return name
    near = nearest(name, names)
    hint = f"did you mean {near!r}?" if near else None
    note = f"known: {', '.join(names)}" if names else None
    raise MoegenError(Problem(f"no {what} is called {name!r}", hint=hint, note=note))
