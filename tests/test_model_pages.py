"""The pages on kinds of models: every spec in them is planned, and every snippet runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import moegen

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "models").glob("*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [block[2] for block in FENCE.finditer(text) if block[1] == language]


SPECS = [
    pytest.param(page, block, id=f"{page.stem}-{index}")
    for page in PAGES
    for index, block in enumerate(blocks(page, "yaml"))
]


@pytest.mark.parametrize(("page", "block"), SPECS)
def test_specs_are_planned(page: Path, block: str, tmp_path: Path) -> None:
    (tmp_path / "specs").symlink_to(ROOT / "specs")
    file = tmp_path / "snippet.yaml"
    file.write_text(block)
    loaded = moegen.load(file)
    assert loaded.spec.model.kind == page.stem
    assert moegen.plan(loaded).root.totals()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run_one_after_the_other(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    for snippet in blocks(page, "python"):
        exec(snippet, names)
        assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short_and_its_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "```yaml" in text
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (page.parent / link).exists(), link
