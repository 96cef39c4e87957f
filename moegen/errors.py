"""Turns problems, each with its place in a spec, into one report that a terminal can show."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MOST = 20  # problems in one report
WIDTH = 100  # characters of a source line that are shown
SENTENCE = 1000  # characters of a message
_BEFORE = 60  # of these, how many may stand before the column

_PLAIN_KEY = re.compile(r"[\w-]{1,40}")


@dataclass(frozen=True)
class Mark:
    """A place in a spec: file, line and column counted from 1, and the text of that line.

    via: for a place in a preset, where that preset is asked for.
    """

    file: str
    line: int
    column: int
    text: str
    via: Mark | None = None


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a sentence, where, and what may help."""

    message: str
    mark: Mark | None = None
    path: tuple[str | int, ...] = ()
    hint: str | None = None
    note: str | None = None


class MoegenError(Exception):
    """Whatever moegen refuses to do, with every reason at once."""

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        """Take a sentence, a problem, or all problems that were found."""
        if isinstance(problems, str):
            problems = Problem(problems)
        if isinstance(problems, Problem):
            problems = (problems,)
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        """The whole report."""
        return render(self.problems)


class SpecError(MoegenError):
    """The text of a spec, or what it describes, is not valid."""


class PlanError(MoegenError):
    """A valid spec cannot be planned for this workload."""


class BackendError(MoegenError):
    """A backend is unknown, broken, or cannot run this plan here."""


class PackageError(MoegenError):
    """A package cannot be written, read or checked."""


def render(problems: Iterable[Problem]) -> str:
    """The report of some problems, sorted by place; of many only the first."""
    ordered = sorted(dict.fromkeys(problems), key=_place)
    texts = [_one(problem) for problem in ordered[:MOST]]
    if len(ordered) > MOST:
        texts.append(f"... and {len(ordered) - MOST} more")
    return "\n".join(texts)


def dotted(path: tuple[str | int, ...]) -> str:
    """A path as users write it: moe.experts.count."""
    return ".".join(
        visible(part) if isinstance(part, str) and _PLAIN_KEY.fullmatch(part) else _odd(part)
        for part in path
    )


def visible(text: str) -> str:
    """The text with each character that would act on a terminal, or hide, written as an escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _shows(c) else _escape(c) for c in text)


def _place(problem: Problem) -> tuple[bool, str, int, int]:
    mark = problem.mark
    return (True, "", 0, 0) if mark is None else (False, mark.file, mark.line, mark.column)


def _one(problem: Problem) -> str:
    mark = problem.mark
    place = f"{visible(mark.file)}:{mark.line}:{mark.column}: " if mark else ""
    sentence = problem.message + (f"; {problem.hint}" if problem.hint else "")
    sentence = sentence if len(sentence) <= SENTENCE else f"{sentence[:SENTENCE]}..."
    lines = [f"{place}error: {visible(sentence)}"]
    if problem.note:
        lines += [f"  {visible(line)}" for line in problem.note.splitlines()]
    if mark:
        lines += _origins(mark)
        lines += _excerpt(mark, problem.path)
    elif problem.path:
        lines.append(f"  at {dotted(problem.path)}")
    return "\n".join(line.rstrip() for line in lines)


def _origins(mark: Mark) -> Iterator[str]:
    """A line for each preset that a place is reached through, the innermost first."""
    while mark.via:
        place = f"{mark.via.file}:{mark.via.line}"
        yield visible(f"  from {mark.file} at {place}")
        mark = mark.via


def _excerpt(mark: Mark, path: tuple[str | int, ...]) -> list[str]:
    before, after = _window(mark.text, mark.column - 1)
    caret = f"{' ' * _columns(before)}^ {dotted(path)}"
    return [f"{mark.line:>6} | {before}{after}", f"{'':>6} | {caret}"]


def _window(text: str, column: int) -> tuple[str, str]:
    """The visible text before and after a column, cut to what fits on a screen."""
    start, end = 0, len(text)
    if end > WIDTH:
        start = max(0, min(column - _BEFORE, end - WIDTH))
        end = min(end, start + WIDTH)
    before = ("..." if start else "") + visible(text[start:column])
    after = visible(text[max(start, column) : end]) + ("..." if end < len(text) else "")
    return before, after


def _columns(text: str) -> int:
    """Columns of a terminal that the text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + _wide(c) for c in text)


def _wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _shows(character: str) -> bool:
    # str.isprintable is false for controls, bidirectional marks, surrogates and odd spaces.
    return character.isprintable()


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _odd(part: str | int) -> str:
    text = str(part) if isinstance(part, int) else repr(part[:41])
    return visible(text if isinstance(part, int) or len(part) <= 40 else f"{text[:40]}...'")
