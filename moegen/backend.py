"""Backends: what turns a plan's ops into code, as data; found by entry point."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from moegen.errors import BackendError, Problem
from moegen.passes.fuse import Fusion
from moegen.planner import Plan

GROUP = "moegen.backends"


def _nothing(plan: Plan) -> Iterator[Problem]:
    yield from ()


def _no_files(ops: set[str]) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Backend:
    """How ops are emitted, and which of them are made from several first.

    ops: gives the text of the package's ops.py for the names of the ops that a model uses.
    files: gives the package's further files by name, at most one folder deep, for the same names.
    needs: reasons why a plan cannot run with this backend here.
    fusions: rewrites of a plan's graphs, in this order, before anything is counted or emitted.
    lacks: what of a plan is emitted as plain PyTorch, because this backend has nothing better.
    says: what this backend decided about a plan.
    tune: measures what suits this machine best, for a plan's shapes and batches of so many tokens,
        and writes it into the folder of its package; progress is a bar of rich, or None. Returns
        a sentence on what it wrote. Raises RuntimeError where it cannot measure.
    """

    name: str
    summary: str
    ops: Callable[[set[str]], str]
    needs: Callable[[Plan], Iterator[Problem]] = _nothing
    files: Callable[[set[str]], Mapping[str, str]] = _no_files
    fusions: tuple[Fusion, ...] = ()
    lacks: Callable[[Plan], Iterator[Problem]] = _nothing
    says: Callable[[Plan], Iterator[Problem]] = _nothing
    tune: Callable[[Plan, Path, Sequence[int], Any], str] | None = None


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
    """The backend of a name; anything with the fields of Backend will do.

    What has the first four alone is given the others.
    """
    known = backends()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"installed: {', '.join(sorted(known))}"
        raise BackendError(Problem(f"no backend is called {name!r}", hint=hint))
    loaded = known[name].load()
    missing = [f for f in ("name", "summary", "ops", "needs") if not hasattr(loaded, f)]
    if missing:
        raise BackendError(f"backend {name!r} lacks {', '.join(missing)} ({known[name].value})")
    if isinstance(loaded, Backend):
        return loaded
    given = (f.name for f in fields(Backend) if hasattr(loaded, f.name))
    return Backend(**{name: getattr(loaded, name) for name in given})
