"""Lists what is there: backends and specs."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from moegen.errors import MoegenError
from moegen.report.screen import note, plain, table


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
