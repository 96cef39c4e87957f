"""Finds the variable an author assigns an expression to, from the running frame."""

from __future__ import annotations

import ast
import functools
import linecache
import sys
from types import FrameType

from moegen.errors import MoegenError

Span = tuple[int, int, int, int]
Names = str | tuple[str, ...]

# Frames of these places are machinery between the author's line and the tracer.
_MACHINERY = ("/torch/", "/moegen/graph/", "/moegen/ops/op.py", "/functools.py")


def author_frame(frame: FrameType | None = None) -> FrameType | None:
    """The innermost frame, from `frame` outwards, that belongs to the author of an element.

    The search ends where the tracing of the program began.
    """
    frame = frame or sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "trace_program":
        name = frame.f_code.co_filename.replace("\\", "/")
        if not any(place in name for place in _MACHINERY):
            return frame
        frame = frame.f_back
    return None


def assigned(frame: FrameType | None) -> Names | None:
    """What the expression that `frame` is evaluating right now is assigned to, if anything.

    What a function returns is called what its caller assigns it to. Works from the byte
    code's column positions (Python 3.11 or later), so that a graph node can bear the name that
    its author gave the value.
    """
    while frame is not None:
        positions = list(frame.f_code.co_positions())[frame.f_lasti // 2]
        line, end_line, column, end_column = positions
        if line is None or end_line is None or column is None or end_column is None:
            raise MoegenError(_SWITCHED_OFF)
        span = (line, end_line, column, end_column)
        found = _places(frame.f_code.co_filename).get(span)
        if found != _RETURNED:
            return found
        frame = author_frame(frame.f_back) if frame.f_back else None
    return None


_SWITCHED_OFF = (
    "column positions are switched off in this Python (-X no_debug_ranges or "
    "PYTHONNODEBUGRANGES); switch them on, the names in generated code come from them"
)
_RETURNED: Names = ()


@functools.lru_cache(maxsize=256)
def _places(filename: str) -> dict[Span, Names]:
    """Every assignment of a file, by the place of its value and of its tuple of targets."""
    found: dict[Span, Names] = {}
    for node in ast.walk(ast.parse("".join(linecache.getlines(filename)))):
        if isinstance(node, ast.Return) and node.value is not None:
            found[_span(node.value)] = _RETURNED
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        target = node.targets[0]
        names = _names(target)
        if names is None:
            continue
        found[_span(node.value)] = names
        if isinstance(target, ast.Tuple):
            found[_span(target)] = names
            if isinstance(node.value, ast.Tuple):
                found |= dict(zip(map(_span, node.value.elts), names, strict=False))
    return found


def _names(target: ast.expr) -> Names | None:
    if isinstance(target, ast.Name):
        return target.id
    if isinstance(target, ast.Tuple) and all(isinstance(t, ast.Name) for t in target.elts):
        return tuple(t.id for t in target.elts if isinstance(t, ast.Name))
    return None


def _span(node: ast.expr) -> Span:
    return node.lineno, node.end_lineno or 0, node.col_offset, node.end_col_offset or 0
