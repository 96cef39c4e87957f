"""Turns a spec file and the files it extends into one tree."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import networkx as nx

from moegen.errors import Mark, Problem, SpecError
from moegen.spec.element import Element
from moegen.spec.merge import merge
from moegen.spec.scan import BYTES, decode
from moegen.spec.tree import Tree, parse
from moegen.spec.words import nearest, show

KEY = "extends"
DEPTH = 16
FILES = 64
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class _Loaded:
    name: str  # as messages show it
    size: int
    tree: Tree
    bases: tuple[tuple[str, Mark], ...]  # names as written joined to the directory, and where


def read_tree(
    path: str | os.PathLike[str], root: type[Element] | None = None
) -> tuple[Tree, tuple[str, ...]]:
    """The tree of a file with all that it extends, and the names of the files, itself first."""
    first = os.fspath(path)
    files = _collect(first)
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(files)
    for key, file in files.items():
        graph.add_edges_from((key, _identity(base)) for base, _ in file.bases)
    _refuse_cycle(graph, files)
    if nx.dag_longest_path_length(graph, default_weight=1) > DEPTH:
        mark = files[_identity(first)].bases[0][1]
        raise SpecError(Problem(f"extends is more than {DEPTH} files deep", mark, (KEY,)))
    # Bases first, and each file once: a base that many files share is not merged many times.
    merged: dict[str, Tree] = {}
    for key in reversed(list(nx.topological_sort(graph))):
        merged[key] = _merged(files[key], merged, root)
    return merged[_identity(first)], tuple(file.name for file in files.values())


def root_mapping(tree: Tree) -> dict[str, Any]:
    """The data of a tree, which must be a mapping."""
    if isinstance(tree.data, dict):
        return tree.data
    mark = tree.marks[()]
    if tree.data is None:
        raise SpecError(Problem("the spec is empty", mark))
    hint = None
    if isinstance(tree.data, str) and ":" in tree.data:
        hint = "write a space after each ':'"
    raise SpecError(
        Problem(f"a spec is a mapping of keys to values, not {show(tree.data)}", mark, hint=hint)
    )


def _collect(first: str) -> dict[str, _Loaded]:
    """Every file that is reached, read once."""
    files = {_identity(first): _load(first, None)}
    waiting = list(files.values())
    while waiting:
        file = waiting.pop(0)
        for name, mark in file.bases:
            key = _identity(name)
            if key in files:
                continue
            if len(files) == FILES:
                raise SpecError(Problem(f"extends reaches more than {FILES} files", mark, (KEY,)))
            files[key] = _load(name, mark)
            waiting.append(files[key])
            if sum(one.size for one in files.values()) > BYTES:
                message = f"a spec and all that it extends have at most {BYTES >> 10} KiB"
                raise SpecError(Problem(message, mark, (KEY,)))
    return files


def _identity(name: str) -> str:
    return os.path.realpath(name)


def _load(name: str, asked: Mark | None) -> _Loaded:
    raw = _bytes(name, asked)
    tree = parse(decode(raw, name), name)
    data = dict(root_mapping(tree))
    bases = _bases(data.pop(KEY), tree, name) if KEY in data else ()
    marks = {path: mark for path, mark in tree.marks.items() if path[:1] != (KEY,)}
    return _Loaded(name, len(raw), Tree(data, marks), bases)


def _bytes(name: str, asked: Mark | None) -> bytes:
    path = (KEY,) if asked else ()
    try:
        if not File(name).exists():
            message = f"no file {name!r}"
            raise SpecError(Problem(message, asked, path, _nearby(name)))
        if not File(name).is_file():
            raise SpecError(Problem(f"{name!r} is not a file", asked, path))
        with open(name, "rb") as file:
            return file.read(BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        message = f"{name!r} cannot be read: {reason}"
        raise SpecError(Problem(message, asked, path)) from None


def _nearby(name: str) -> str | None:
    folder, wanted = os.path.split(name)
    try:
        with os.scandir(folder or ".") as entries:
            names = [entry.name for entry, _ in zip(entries, range(1000), strict=False)]
    except OSError:
        return None
    best = nearest(wanted, [found for found in names if found.endswith(_SUFFIXES)])
    return f"did you mean {os.path.join(folder, best)!r}?" if best else None


def _bases(value: Any, tree: Tree, name: str) -> tuple[tuple[str, Mark], ...]:
    many = isinstance(value, list)
    found: list[tuple[str, Mark]] = []
    problems: list[Problem] = []
    for index, base in enumerate(value if many else [value]):
        path = (KEY, index) if many else (KEY,)
        mark = tree.marks[path]
        if not isinstance(base, str):
            message = f"extends names a file or a list of files, not {show(base)}"
            problems.append(Problem(message, mark, path))
        elif not base.endswith(_SUFFIXES):
            message = f"extends names .yaml files, not {show(base)}"
            problems.append(Problem(message, mark, path))
        elif any(base == known for known, _ in found):
            problems.append(Problem(f"{show(base)} is extended twice", mark, path))
        else:
            found.append((base, mark))
    if problems:
        raise SpecError(problems)
    folder = os.path.dirname(name)
    return tuple((os.path.normpath(os.path.join(folder, base)), mark) for base, mark in found)


def _refuse_cycle(graph: nx.DiGraph[str], files: dict[str, _Loaded]) -> None:
    try:
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
    except nx.NetworkXNoCycle:
        return
    names = [os.path.basename(files[key].name) for key in (*cycle, cycle[0])]
    after = cycle[1 % len(cycle)]
    mark = next(mark for base, mark in files[cycle[0]].bases if _identity(base) == after)
    raise SpecError(Problem(f"extends goes in a circle: {' -> '.join(names)}", mark, (KEY,)))


def _merged(file: _Loaded, merged: dict[str, Tree], root: type[Element] | None) -> Tree:
    """What a file says over all that its bases say; of these, later ones win."""
    tree: Tree | None = None
    for base in [*(merged[_identity(name)] for name, _ in file.bases), file.tree]:
        tree = base if tree is None else merge(tree, base, root)
    assert tree is not None
    return tree
