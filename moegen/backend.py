"""Backends: what turns a plan's ops into code, as data; found by entry point."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from moegen.errors import BackendError, Problem
from moegen.planner import Plan

GROUP = "moegen.backends"


def _nothing(plan: Plan) -> Iterator[Problem]:
    yield from ()


@dataclass(frozen=True)
class Backend:
    """How ops are emitted.

    ops: gives the text of the package's ops.py for the names of the ops that a model uses.
    needs: reasons why a plan cannot run with this backend here.
    """

    name: str
    summary: str
    ops: Callable[[set[str]], str]
    needs: Callable[[Plan], Iterator[Problem]] = _nothing


def backends() -> dict[str, Any]:
    """Names of the installed backends, with their entry points."""
    found: dict[str, Any] = {}
    for point in entry_points(group=GROUP):
        known = found.get(point.name)
        if known is not None and known.value != point.value:
            places = f"{known.value} and {point.value}"
            raise BackendError(f"two backends are called {point.name!r}: {places}; remove one")
        found[point.name] = point
    return found


def backend(name: str) -> Backend:
    """The backend of a name; anything with the fields of Backend will do."""
    known = backends()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"installed: {', '.join(sorted(known))}"
        raise BackendError(Problem(f"no backend is called {name!r}", hint=hint))
    loaded = known[name].load()
    missing = [f for f in ("name", "summary", "ops", "needs") if not hasattr(loaded, f)]
    if missing:
        raise BackendError(f"backend {name!r} lacks {', '.join(missing)} ({known[name].value})")
    return loaded  # type: ignore[no-any-return]
