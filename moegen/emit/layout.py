"""Breaks statements that are too long for a line, the way ruff format would."""

from __future__ import annotations

WIDTH = 88
_OPEN, _CLOSE = "([{", ")]}"


def lay_out(statement: str, indent: int) -> list[str]:
    """A statement as lines of at most WIDTH columns, where its brackets allow it."""
    line = " " * indent + statement
    if len(line) <= WIDTH:
        return [line]
    place = _bracket(statement)
    if place is None:
        return [line]
    start, end = place
    head, body, tail = statement[: start + 1], statement[start + 1 : end], statement[end:]
    inner = " " * (indent + 4) + body
    one_line = len(inner) <= WIDTH and not _is_literal(statement, start, body)
    if one_line or _is_comprehension(body):
        return [" " * indent + head, inner, " " * indent + tail]
    lines = [" " * indent + head]
    items = split(body)
    for item in items:
        broken = lay_out(item, indent + 4)
        several = len(items) > 1 or head.endswith("{") or body.endswith(",")
        broken[-1] += "," if several else ""
        lines += broken
    return [*lines, " " * indent + tail]


def fits(statement: str, indent: int) -> bool:
    """Whether a statement can be laid out within WIDTH."""
    return all(len(line) <= WIDTH for line in lay_out(statement, indent))


def split(text: str) -> list[str]:
    """The parts of a bracket's content, divided at its own commas."""
    parts, start, depth = [], 0, 0
    for index, quoted, character in _characters(text):
        if quoted:
            continue
        depth += (character in _OPEN) - (character in _CLOSE)
        if character == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _is_comprehension(body: str) -> bool:
    """Whether a bracket's content is one generator, which takes no trailing comma."""
    return len(split(body)) == 1 and " for " in body and " in " in body


def _is_literal(statement: str, start: int, body: str) -> bool:
    """Whether a bracket is of a collection, whose items have a line each, and not of a call."""
    before = statement[:start][-1:]
    if before.isalnum() or before in {"_", ")", "]"}:
        return False
    return statement[start] != "(" or len(split(body)) > 1


def _bracket(statement: str) -> tuple[int, int] | None:
    """The outermost bracket to break at: the only one, at the statement's end."""
    found: list[tuple[int, int]] = []
    depth, start = 0, 0
    for index, quoted, character in _characters(statement):
        if quoted:
            continue
        if character in _OPEN:
            start = index if depth == 0 else start
            depth += 1
        elif character in _CLOSE:
            depth -= 1
            if depth == 0:
                found.append((start, index))
    if not found:
        return None
    start, end = found[-1]
    rest = statement[end + 1 :]
    is_definition = statement.startswith(("def ", "class "))
    if is_definition:
        return found[0]
    return (start, end) if len(found) == 1 and rest in ("", ":") else None


def _characters(text: str) -> list[tuple[int, bool, str]]:
    """Every character with its index and whether it stands in a string."""
    out, quote = [], ""
    for index, character in enumerate(text):
        if quote:
            out.append((index, True, character))
            if character == quote and text[index - 1] != "\\":
                quote = ""
        elif character in "\"'":
            quote = character
            out.append((index, True, character))
        else:
            out.append((index, False, character))
    return out
