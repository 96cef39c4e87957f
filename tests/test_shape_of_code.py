"""The shape of the code, read off the source: small files and functions that say what they are.

Who may import whom is checked by test_architecture.py against the list in the docs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "moegen").rglob("*.py")) + sorted((ROOT / "backends").rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, *, top: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_part_of_moegen_imports_a_backend(path: Path) -> None:
    if "backends" not in path.parts:
        assert not [m for m in imports(path) if m.startswith("moegen_")]


def test_the_command_imports_nothing_heavy_at_first() -> None:
    heavy = {"torch", "pydantic", "numpy", "networkx", "rich", "yaml"}
    assert not heavy & {m.split(".")[0] for m in imports(ROOT / "moegen" / "cli.py", top=True)}


def test_runtime_files_stand_alone() -> None:
    for path in (ROOT / "moegen" / "emit" / "runtime").glob("*.py"):
        found = {m.split(".")[0] for m in imports(path)}
        assert "moegen" not in found, path


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_small_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 350, f"{len(lines)} lines"
    assert max(map(len, lines), default=0) <= 100
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no docstring"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            size = (node.end_lineno or 0) - node.lineno + 1
            assert isinstance(node, ast.ClassDef) or size <= 60, f"{node.name}: {size} lines"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_files_are_mostly_short() -> None:
    sizes = sorted(len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCES)
    assert sizes[len(sizes) // 2] <= 130
