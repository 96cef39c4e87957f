"""Cuts the lines of one section out of a spec's file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moegen.errors import Mark

MOST = 24  # lines of a section that are shown


@dataclass(frozen=True)
class Lines:
    """Lines of a file with the number of the first, and how many more the section has."""

    file: str
    first: int
    text: tuple[str, ...]
    more: int = 0


def section(mark: Mark) -> Lines:
    """The line of a mark and those below that are indented deeper, as they stand in the file."""
    try:
        lines = Path(mark.file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return Lines(mark.file, mark.line, (mark.text,))
    start = mark.line - 1
    if start >= len(lines) or lines[start] != mark.text:
        return Lines(mark.file, mark.line, (mark.text,))  # an override, or edited meanwhile
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > mark.column - 1):
        end += 1
    while not lines[end - 1].strip():
        end -= 1
    shown = min(end, start + MOST)
    return Lines(mark.file, mark.line, tuple(lines[start:shown]), end - shown)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
