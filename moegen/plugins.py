"""Elements from elsewhere: installed packages and a user's own files register them by subclassing.

An installed package names modules under the entry-point group `moegen.elements`; importing such
a module is all it takes, because a member of a family registers itself.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from moegen.errors import MoegenError, Problem

GROUP = "moegen.elements"


@functools.cache
def load_installed() -> tuple[str, ...]:
    """Import every installed module of elements, once; the names of their entry points."""
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    for point in points:
        _load(point)
    return tuple(point.name for point in points)


def load_file(path: str | os.PathLike[str]) -> ModuleType:
    """Import a Python file that defines elements, once for each place on the disk.

    This runs the file, so it happens only where the user names it.
    """
    place = Path(path).resolve()
    if not place.is_file():
        raise MoegenError(f"--import: there is no file {os.fspath(path)}")
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
    name = f"moegen_import_{digest}_{place.stem}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, place)
    if found is None or found.loader is None:
        raise MoegenError(f"--import: {os.fspath(path)} is not a Python file")
    made = importlib.util.module_from_spec(found)
    sys.modules[name] = made  # ops and element classes are looked up by their module's name
    try:
        found.loader.exec_module(made)
    except Exception as error:
        del sys.modules[name]
        raise MoegenError(_problem(f"cannot import {os.fspath(path)}", error, place)) from error
    return made


def _load(point: EntryPoint) -> None:
    try:
        point.load()
    except Exception as error:
        where = f"the elements {point.name!r} ({point.value})"
        package = f" of {point.dist.name}" if point.dist else ""
        hint = f"repair or remove the package{package}"
        raise MoegenError(_problem(f"cannot import {where}", error, hint=hint)) from error


def _problem(
    what: str, error: Exception, place: Path | None = None, hint: str | None = None
) -> Problem:
    """The error as one sentence, with the line of the user's file that it comes from."""
    trace = error.__traceback__
    line = None
    while trace is not None:
        if place is not None and trace.tb_frame.f_code.co_filename == str(place):
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        line = error.lineno
    said = str(error).splitlines()[0] if str(error) else "no message"
    at = f", line {line}" if line else ""
    return Problem(f"{what}{at}: {type(error).__name__}: {said}", hint=hint)
