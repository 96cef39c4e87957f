"""Lists what is there: backends and specs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from moegen.errors import MoegenError
from moegen.report import numbers
from moegen.report.screen import note, plain, table
from moegen.spec.source import read


def print_backends(screen: Console, spec: str | None) -> None:
    """Every backend with its summary, and what it lacks here."""
    from moegen.api import plan
    from moegen.backend import backends

    made = plan(spec) if spec else None
    rows = table(None, ("backend", "summary", "missing"))
    for name in sorted(backends()):
        summary, missing = _state(name, made)
        rows.add_row(plain(name), plain(summary), plain(missing or "nothing"))
    screen.print(rows)
    if spec is None:
        note(screen, "`moegen backends SPEC` also says what a model needs that is not here.")


def _state(name: str, made: Any) -> tuple[str, str]:
    from moegen.backend import backend

    try:
        loaded = backend(name)
        problems = loaded.needs(made) if made is not None else ()
        return loaded.summary, "; ".join(problem.message for problem in problems)
    except MoegenError as error:
        return "", "; ".join(problem.message for problem in error.problems)
    except ImportError as error:
        return "", f"it cannot be imported: {error}"


def print_specs(screen: Console, *, counted: bool) -> None:
    """Every spec by name: total and active parameters, and where the architecture is from."""
    folder = spec_folder()
    title = f"{folder}: {'counted' if counted else 'as published'}"
    rows = table(title, ("name", ">total", ">active", "source"))
    for name, *cells in _counted(folder) if counted else _published(folder):
        rows.add_row(plain(name), *map(plain, cells))
    screen.print(rows)
    said = "both embeddings included" if counted else "as its authors count it"
    note(screen, f"active: parameters that a token uses, {said}.")


def spec_folder() -> Path:
    """./specs, or the specs that come with the package."""
    package = Path(__file__).parents[1]
    for folder in (Path("specs"), package / "specs", package.parent / "specs"):
        if any(folder.glob("*.yaml")):
            return folder
    raise MoegenError("there is no folder ./specs, and no specs come with this installation")


def _published(folder: Path) -> Iterator[tuple[str, ...]]:
    for path in sorted(folder.glob("*.yaml")):
        data = read(path).data
        figures = data.get("published") or {}
        total, active = (str(figures.get(key) or "-") for key in ("total", "active"))
        yield path.stem, total, active, str(data.get("source") or "")


def _counted(folder: Path) -> Iterator[tuple[str, ...]]:
    from moegen.api import load
    from moegen.graph.builder import Trace
    from moegen.parameters import count

    for path in sorted(folder.glob("*.yaml")):
        spec = load(path).spec
        root = Trace(spec).root()
        counts = count(root, spec.model.tied)
        total, active = numbers.count(counts.total), numbers.count(counts.active)
        yield path.stem, total, active, spec.source or ""
