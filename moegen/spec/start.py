"""Starts a spec of one's own from another one: a single file that stands alone."""

from __future__ import annotations

import os
from pathlib import Path

from moegen.errors import MoegenError
from moegen.spec.dump import inline_yaml, resolved_yaml
from moegen.spec.extends import KEY, read_tree, root_mapping
from moegen.spec.names import safe_name
from moegen.spec.scan import decode
from moegen.spec.tree import parse

# What is true of the other model and not of one's own.
DROPPED = ("family", "year", "published")
_EDITOR = "yaml-language-server"  # names a schema beside the other file


def started(path: str | os.PathLike[str], name: str) -> str:
    """The text of a spec called `name` that begins as the one at `path`, with its presets named.

    Comments stay where the spec is a single file; what it extends is merged into the text.
    """
    problem = safe_name(name)
    if problem:
        raise MoegenError(problem)
    data = root_mapping(read_tree(path)[0])
    text = decode(Path(path).read_bytes(), os.fspath(path))
    alone = KEY not in root_mapping(parse(text, os.fspath(path)))
    if alone:
        body = _without(text, os.fspath(path))
    else:
        kept = {k: v for k, v in data.items() if k not in (*DROPPED, KEY, "name")}
        body = resolved_yaml(kept)
    return f"# Started from {Path(path).stem}: see `moegen show` and `moegen estimate`.\n" + (
        f"name: {inline_yaml(name)}\n{body}"
    )


def start(path: str | os.PathLike[str], name: str, place: Path) -> Path:
    """Write that text to a new file; an existing one is never touched."""
    text = started(path, name)
    try:
        with place.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise MoegenError(f"{place} exists; give another place with --out") from None
    except OSError as error:
        raise MoegenError(f"cannot write {place}: {error.strerror or error}") from None
    return place


def _without(text: str, file: str) -> str:
    """A spec's lines but for its name, what is dropped, and comments above the first key."""
    marks = parse(text, file).marks
    lines = text.splitlines()
    keys = [(mark.line - 1, str(path[0])) for path, mark in marks.items() if len(path) == 1]
    starts = sorted((_with_comments(lines, line), key) for line, key in keys)
    ends = [*(line for line, _ in starts[1:]), len(lines)]
    kept: list[str] = []
    for (first, key), end in zip(starts, ends, strict=True):
        if key not in (*DROPPED, "name"):
            kept += lines[first:end]
    return "\n".join(kept).rstrip() + "\n"


def _with_comments(lines: list[str], line: int) -> int:
    """The first of the comments right above a line, or the line itself."""
    while line and lines[line - 1].startswith("#") and _EDITOR not in lines[line - 1]:
        line -= 1
    return line
