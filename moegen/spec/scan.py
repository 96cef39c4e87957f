"""Turns the bytes of a spec into YAML events, a few at a time, so that no input costs much."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import yaml

from moegen.errors import Mark, Problem, SpecError

# Real specs have some kilobytes and hundreds of values; this much still reads within a second.
BYTES = 1 << 18
DEPTH = 64
NODES = 10_000

# Beyond what YAML forbids: odd line breaks, and the marks that reorder text on a screen.
FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\ufefe\uff00-\ufffd"
    "\U00010000-\U0010ffff]"
)
_TOO_LARGE = f"a spec has at most {BYTES >> 10} KiB"
_BREAK = re.compile(r"\r\n|\r|\n")

# What YAML's parser says, by a part of its sentence, and what to say and advise instead.
_SAYINGS = {
    "cannot start any token": ("this character cannot start a value", "put the value in quotes"),
    "mapping values are not allowed": (
        "a ':' is not possible here",
        "put a text with ': ' in quotes, and give each key a line of its own",
    ),
    "while scanning a quoted scalar": ("this quote is not closed", None),
    "while parsing a flow mapping": ("this '{' is not closed with '}'", None),
    "while parsing a flow sequence": ("this '[' is not closed with ']'", None),
    "could not find expected ':'": ("this key has no ':' after it", None),
    "expected <block end>": (
        "the indentation does not fit what stands above",
        "keys of one section start in the same column",
    ),
    "but found '<stream end>'": ("the text ends where more is expected", None),
    "expected the node content": ("a value is missing here", None),
}


def decode(raw: bytes, name: str) -> str:
    """The text of a file, which must be UTF-8 and not too large."""
    if len(raw) > BYTES:
        raise SpecError(Problem(_TOO_LARGE, Mark(name, 1, 1, "")))
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        problem = Problem("this is UTF-16", Mark(name, 1, 1, ""), hint="save it as UTF-8")
        raise SpecError(problem)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig", "replace")
        text = before + raw[error.start : error.start + 80].decode("utf-8", "backslashreplace")
        mark = mark_at(text, len(before), name)
        byte = raw[error.start]
        message = f"byte 0x{byte:02x} is not UTF-8"
        raise SpecError(Problem(message, mark, hint="save the file as UTF-8")) from None


def check(text: str, name: str) -> None:
    """Refuse a text that is too long, or holds characters that no spec needs."""
    if len(text) > BYTES:
        raise SpecError(Problem(_TOO_LARGE, Mark(name, 1, 1, "")))
    found = FORBIDDEN.search(text)
    if found:
        mark = mark_at(text, found.start(), name)
        raise SpecError(Problem(f"{character(found[0])} is not allowed in a spec", mark))


def character(one: str) -> str:
    """A character as its number and name."""
    name = "NUL" if one == "\0" else unicodedata.name(one, "")
    return f"the character U+{ord(one):04X}" + (f" ({name})" if name else "")


def mark_at(text: str, index: int, name: str) -> Mark:
    """The place of an index into a text."""
    lines = split(text[:index])
    line = split(text)[len(lines) - 1]
    return Mark(name, len(lines), len(lines[-1]) + 1, line)


def split(text: str) -> list[str]:
    """The lines of a text, counted as YAML counts them."""
    return _BREAK.split(text)


def events(text: str, name: str) -> Iterator[Any]:
    """The YAML events of a checked text; too deep, too many and bad syntax are SpecErrors."""
    # Events come one by one from a loop without recursion, so a hostile text is left early:
    # composing first would overflow the stack on deep nesting.
    lines = split(text)
    loader = yaml.SafeLoader(text)
    depth = nodes = 0
    try:
        while loader.check_event():
            event = loader.get_event()  # type: ignore[no-untyped-call]
            nodes += isinstance(event, yaml.NodeEvent)
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > DEPTH:
                raise _refused(f"nested deeper than {DEPTH} levels", event, lines, name)
            if nodes > NODES:
                raise _refused(f"more than {NODES} values in one spec", event, lines, name)
            yield event
    except yaml.MarkedYAMLError as error:
        raise SpecError(_syntax(error, lines, name)) from None
    except (ValueError, OverflowError):  # "\UFFFFFFFF"
        message = "an escape in this text stands for no character"
        place = place_of(loader.get_mark(), lines, name)
        raise SpecError(Problem(message, place)) from None
    finally:
        loader.dispose()


def place_of(mark: Any, lines: list[str], name: str) -> Mark:
    """A mark of the YAML parser as ours."""
    line = min(mark.line, len(lines) - 1)
    return Mark(name, line + 1, mark.column + 1, lines[line])


def _refused(message: str, event: Any, lines: list[str], name: str) -> SpecError:
    return SpecError(Problem(message, place_of(event.start_mark, lines, name)))


def _syntax(error: yaml.MarkedYAMLError, lines: list[str], name: str) -> Problem:
    said = f"{error.context or ''}, {error.problem or ''}"
    place = error.problem_mark or error.context_mark
    mark = place_of(place, lines, name)
    if "'\\t'" in said:
        return Problem("a tab cannot stand here", mark, hint="indent with spaces")
    for part, (message, hint) in _SAYINGS.items():
        if part in said:
            # What is not closed is told where it was opened, as the end says nothing.
            if "closed" in message and error.context_mark:
                if "end" not in said and "expected ','" not in said:
                    break
                mark = place_of(error.context_mark, lines, name)
            return Problem(message, mark, hint=hint)
    return Problem(f"YAML cannot be read here: {error.problem or error.context}", mark)
