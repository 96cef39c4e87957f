"""The layers of docs/architecture.md are those of the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FREE = {"__init__", "__main__"}  # the door to everything


def layers() -> dict[str, int]:
    """Every package and module of moegen with its height; 0 is the bottom."""
    block = (
        TEXT.partition("## Who may import whom")[2].partition("```text\n")[2].partition("```")[0]
    )
    lines = reversed(block.strip().splitlines())
    return {name: height for height, line in enumerate(lines) for name in line.split()}


def imported(tree: ast.AST) -> Iterator[str]:
    """Packages and modules of moegen that a file imports, wherever it does, types aside."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moegen."):
            yield str(node.module).split(".")[1]
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("moegen."))
        yield from imported(node)


def test_imports_go_down() -> None:
    height, broken = layers(), []
    for file in sorted((ROOT / "moegen").rglob("*.py")):
        name = file.relative_to(ROOT / "moegen").parts[0].removesuffix(".py")
        if name in FREE:
            continue
        assert name in height, f"docs/architecture.md has no place for {name}"
        for other in imported(ast.parse(file.read_text(encoding="utf-8"))):
            if other not in FREE and other != name and height[other] >= height[name]:
                broken.append(f"{file.relative_to(ROOT)} imports {other}")
    assert broken == []


def test_every_place_is_taken() -> None:
    found = {path.stem for path in (ROOT / "moegen").iterdir() if path.suffix in ("", ".py")}
    assert layers().keys() <= found


def test_what_needs_no_torch_imports_none() -> None:
    names = re.findall(r"`(\w+)`", TEXT.partition("```text\ncli")[2].partition("do not import")[0])
    assert len(names) == 7
    files = (ROOT / "moegen").rglob("*.py")
    parts = (file.relative_to(ROOT).with_suffix("").parts for file in files)
    modules = [".".join(part).removesuffix(".__init__") for part in parts if part[1] in names]
    assert len(modules) > 20
    code = f"import sys, {', '.join(sorted(modules))}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_modules_that_are_named_exist() -> None:
    named = set(re.findall(r"`((?:\w+/)+(?:\w+\.py)?|\w+\.py)`", TEXT))
    inside = ("arch", "arch/routing", "emit", "emit/runtime")
    places = [ROOT, ROOT / "moegen", ROOT / "backends/moegen_triton"]
    places += [ROOT / "moegen" / part for part in inside]
    emitted = {"model.py", "ops.py", "network.py", "runtime.py"}
    missing = [n for n in named - emitted if not any((p / n).exists() for p in places)]
    assert missing in ([], ["runtime/"])
