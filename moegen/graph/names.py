"""Finds the variable an author assigns an expression to, from the running frame."""

from __future__ import annotations

import ast
import functools
import linecache
import sys
from dataclasses import dataclass
from types import FrameType

from moegen.errors import MoegenError

Span = tuple[int, int, int, int]
Names = str | tuple[str, ...]

# Frames of these places are machinery between the author's line and the tracer.
_MACHINERY = ("/torch/", "/moegen/graph/", "/moegen/ops/op.py", "/functools.py")


def is_machinery(filename: str) -> bool:
    """Whether a file is torch's or the tracer's, and not one with elements."""
    name = filename.replace("\\", "/")
    return any(place in name for place in _MACHINERY)


def author_frame(frame: FrameType | None = None) -> FrameType | None:
    """The innermost frame, from `frame` outwards, that belongs to the author of an element.

    The search ends where the tracing of the program began.
    """
    frame = frame or sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "trace_program":
        if not is_machinery(frame.f_code.co_filename):
            return frame
        frame = frame.f_back
    return None


@dataclass(frozen=True)
class _Returned:
    """The value, or one part of the tuple, that a function returns."""

    part: int | None = None


def assigned(frame: FrameType | None) -> Names | None:
    """What the expression that `frame` is evaluating right now is assigned to, if anything.

    What a function returns is called what its caller assigns it to. Works from the byte
    code's column positions (Python 3.11 or later), so that a graph node can bear the name that
    its author gave the value.
    """
    parts: list[int] = []
    while frame is not None:
        positions = list(frame.f_code.co_positions())[frame.f_lasti // 2]
        line, end_line, column, end_column = positions
        if line is None or end_line is None or column is None or end_column is None:
            raise MoegenError(_SWITCHED_OFF)
        span = (line, end_line, column, end_column)
        found = _places(frame.f_code.co_filename).get(span)
        if not isinstance(found, _Returned):
            return _part(found, parts)
        if found.part is not None:
            parts.append(found.part)
        frame = author_frame(frame.f_back) if frame.f_back else None
    return None


def _part(names: Names | None, parts: list[int]) -> Names | None:
    """The name of a part of what is unpacked, however many functions handed it on."""
    for part in reversed(parts):
        if not isinstance(names, tuple) or part >= len(names):
            return None
        names = names[part]
    return names


_SWITCHED_OFF = (
    "column positions are switched off in this Python (-X no_debug_ranges or "
    "PYTHONNODEBUGRANGES); switch them on, the names in generated code come from them"
)


@functools.lru_cache(maxsize=256)
def _places(filename: str) -> dict[Span, Names | _Returned]:
    """Every assignment and return of a file, by the place of its value and of its targets."""
    found: dict[Span, Names | _Returned] = {}
    for node in ast.walk(ast.parse("".join(linecache.getlines(filename)))):
        if isinstance(node, ast.Return) and node.value is not None:
            for value in _branches(node.value):
                found[_span(value)] = _Returned()
                if isinstance(value, ast.Tuple):
                    found |= {_span(v): _Returned(i) for i, v in enumerate(value.elts)}
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            names = _names(node.targets[0])
            if names is not None:
                found |= _assigned_values(node, names)
    return found


def _assigned_values(node: ast.Assign, names: Names) -> dict[Span, Names | _Returned]:
    """The places of an assignment's value, or of its parts, with what they are assigned to."""
    found: dict[Span, Names | _Returned] = {}
    for value in _branches(node.value):
        found[_span(value)] = names
        if isinstance(value, ast.Tuple) and isinstance(names, tuple):
            found |= dict(zip(map(_span, value.elts), names, strict=False))
    if isinstance(node.targets[0], ast.Tuple):
        found[_span(node.targets[0])] = names
    return found


def _branches(value: ast.expr) -> list[ast.expr]:
    """The expressions that a value may be: those of a conditional expression, or itself."""
    if isinstance(value, ast.IfExp):
        return [*_branches(value.body), *_branches(value.orelse)]
    return [value]


def _names(target: ast.expr) -> Names | None:
    if isinstance(target, ast.Name):
        return target.id
    if isinstance(target, ast.Tuple) and all(isinstance(t, ast.Name) for t in target.elts):
        return tuple(t.id for t in target.elts if isinstance(t, ast.Name))
    return None


def _span(node: ast.expr) -> Span:
    return node.lineno, node.end_lineno or 0, node.col_offset, node.end_col_offset or 0
