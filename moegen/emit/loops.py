"""Rolls equal statements for one layer after another into a loop over the layers."""

from __future__ import annotations

import re

from moegen.emit.body import Statement

_LAYER = re.compile(r"self\.layers\[(\d+)\]")
_ITEM = re.compile(r"(?<![\w.])([a-z_]+)\[(\d+)\]")


_ONE = {"cache": "held", "routing": "record"}  # what one item of a collection is called


def roll(statements: list[Statement], depth: int) -> list[tuple[int, Statement]]:
    """Statements with their indentation; equal calls of a stack of `depth` become loops."""
    out: list[tuple[int, Statement]] = []
    at = 0
    while at < len(statements):
        run = _run(statements, at, depth)
        if run is None:
            out.append((0, statements[at]))
            at += 1
            continue
        header, body, length = run
        out.append((0, Statement(header)))
        out += [(1, statement) for statement in body]
        at += length
    return out


def _layer(statement: Statement) -> int | None:
    found = _LAYER.search(statement.code)
    return int(found[1]) if found else None


def _run(
    statements: list[Statement], at: int, depth: int
) -> tuple[str, list[Statement], int] | None:
    """The longest loop that starts here: its header, body, and how many statements it is."""
    first = _layer(statements[at])
    if first is None:
        return None
    size = next((i for i, s in enumerate(statements[at + 1 :], 1) if _layer(s) is not None), None)
    if size is None:
        return None
    groups = [statements[at : at + size]]
    step = (_layer(statements[at + size]) or 0) - first
    while True:
        start = at + size * len(groups)
        group = statements[start : start + size]
        wanted = first + step * len(groups)
        if len(group) < size or _layer(group[0]) != wanted:
            break
        if _pattern(group, wanted, len(groups)) != _pattern(groups[0], first, 0):
            break
        groups.append(group)
    if len(groups) < 2 or step < 1:
        return None
    names = sorted({m[1] for s in groups[0] for m in _ITEM.finditer(s.code)})
    starts = {name: _first_index(name, groups[0]) for name in names}
    layers = f"self.layers{_slice(first, step, len(groups), depth)}"
    body = [Statement(_inside(s.code), s.section) for s in groups[0]]
    return _header(layers, starts), body, size * len(groups)


def _pattern(group: list[Statement], layer: int, turn: int) -> list[str]:
    """A group's text without the numbers that count with the loop."""

    def relative(match: re.Match[str]) -> str:
        return f"{match[1]}[+{int(match[2]) - turn}]"

    codes = [s.code.replace(f"self.layers[{layer}]", "layer") for s in group]
    return [_ITEM.sub(relative, code) for code in codes]


def _first_index(name: str, group: list[Statement]) -> int:
    found = (m for s in group for m in _ITEM.finditer(s.code) if m[1] == name)
    return int(next(found)[2])


def _header(layers: str, starts: dict[str, int]) -> str:
    if not starts:
        return f"for layer in {layers}:"
    targets = ", ".join(["layer", *map(_one, starts)])
    others = [f"{name}[{start}:]" if start else name for name, start in starts.items()]
    return f"for {targets} in zip({', '.join([layers, *others])}, strict=False):"


def _slice(first: int, step: int, count: int, depth: int) -> str:
    """The slice of the layers that a loop goes over, left open where that says the same."""
    end = first + step * (count - 1) + 1
    start, stop = str(first or ""), "" if end + step > depth else str(end)
    if step > 1:
        return f"[{start}:{stop}:{step}]"
    return f"[{start}:{stop}]" if start or stop else ""


def _one(name: str) -> str:
    return _ONE.get(name, f"one_{name}")


def _inside(code: str) -> str:
    return _ITEM.sub(lambda m: _one(m[1]), _LAYER.sub("layer", code))
