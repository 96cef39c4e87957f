"""Who may import whom, and how large files and functions may be: read off the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "moegen").rglob("*.py")) + sorted((ROOT / "backends").rglob("*.py"))

# A module may import from its own line and from lines below it.
LAYERS = (
    ("cli", "__main__", "draw", "report", "plugins"),
    ("api", "convert"),
    ("estimator", "emit", "backend"),
    ("planner",),
    ("arch", "passes", "parameters"),
    ("graph",),
    ("ops",),
    ("optimizers", "gpus", "choices"),
    ("spec",),
    ("errors",),
)
LEVEL = {name: len(LAYERS) - i for i, names in enumerate(LAYERS) for name in names}
# What a lower layer may take from a higher one, with the reason.
ALLOWED = {
    ("api", "plugins"),  # plug-ins are loaded when a spec is read
    ("optimizers", "graph"),  # the type of a weight, for annotations only
    ("backend", "planner"),
}


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else "moegen"


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
def test_imports_go_downwards(path: Path) -> None:
    here = name_of(path)
    if here == "moegen" or here.startswith("backends"):
        return  # the door opens on everything; backends are outside
    mine = part(here)
    for module in imports(path):
        if not module.startswith("moegen.") or part(module) == mine:
            continue
        other = part(module)
        below = LEVEL[other] < LEVEL[mine] or any({mine, other} <= set(line) for line in LAYERS)
        assert below or (mine, other) in ALLOWED, f"{here} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_part_of_moegen_imports_a_backend(path: Path) -> None:
    if "backends" not in path.parts:
        assert not [m for m in imports(path) if m.startswith("moegen_")]


def test_specs_and_errors_know_nothing_of_torch() -> None:
    for path in [ROOT / "moegen" / "errors.py", *(ROOT / "moegen" / "spec").rglob("*.py")]:
        assert "torch" not in {m.split(".")[0] for m in imports(path)}, path


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
