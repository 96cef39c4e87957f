"""The page on training policies: snippets are planned and run, and its table is of the presets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import moegen
from moegen.backend import backend
from moegen.emit.package import package
from moegen.spec import presets

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "training.md"
TEXT = PAGE.read_text(encoding="utf-8")
TINY = ROOT / "specs" / "tiny.yaml"
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(language: str) -> list[str]:
    return [block[2] for block in FENCE.finditer(TEXT) if block[1] == language]


def over_tiny(snippet: str, folder: Path, **more: Any) -> Any:
    """A snippet laid over tiny.yaml, all of whose layers have a capacity and a loss."""
    said = yaml.safe_load(snippet)
    capacity = {"moe": {"capacity": 2.0, "losses": {"balance": 0.01}}}
    spec = {"name": "x", "model": capacity, **said, "extends": str(TINY), **more}
    file = folder / "over.yaml"
    file.write_text(yaml.safe_dump(spec))
    return moegen.plan(file, batch=1, sequence=16)


@pytest.mark.parametrize("snippet", snippets("yaml"))
def test_snippets_are_planned(snippet: str, tmp_path: Path) -> None:
    plan = over_tiny(snippet, tmp_path)
    assert plan.spec.train != type(plan.spec.train)()
    assert not [problem for problem in plan.warnings if problem.path[0] == "train"]


def test_snippets_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model = moegen.module(str(TINY)).Model()
    for snippet in snippets("python"):
        exec(snippet, {"model": model})
        assert capsys.readouterr().out


def test_emitted_code_is_what_is_emitted() -> None:
    (line,) = snippets("text")
    plan = moegen.plan(str(TINY), {"train.freeze": ["router"]}, batch=1, sequence=16)
    assert line in package(plan, backend("eager")).files["model.py"].replace("        ", "")


def test_the_table_is_of_the_presets() -> None:
    lines = ["| preset | what it is | source |", "|---|---|---|"]
    for name in presets.names("train"):
        told = presets.about("train", name)
        link = f"[{told.title}](../moegen/presets/train/{name}.yaml)"
        lines.append(f"| `{name}` | {link} | {told.source} |")
    begin, end = "<!-- presets: begin -->\n", "\n<!-- presets: end -->"
    assert TEXT.partition(begin)[2].partition(end)[0] == "\n".join(lines)


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([\w./-]+)\)", TEXT):
        assert (PAGE.parent / link).exists(), link
