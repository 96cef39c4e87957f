"""The pages on routing: every snippet is planned or run, and the table of presets is theirs."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from preset_specs import EXPERTS, SIZES, laid_over, tiny_over

import moegen
from moegen.observe import Recorder
from moegen.spec import presets

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted((DOCS / "routing").glob("*.md"))
INDEX = (DOCS / "routing" / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODEL = {"vocab_size": 256, "d_model": 64, "layers": 4, "max_sequence": 64, "ffn": 128}


def snippets(language: str) -> list[Any]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in FENCE.finditer(text):
            line = text.count("\n", 0, block.start()) + 1
            if block[1] == language:
                found.append(pytest.param(block[2], id=f"{page.stem}:{line}"))
    return found


def spec_of(snippet: str) -> dict[str, Any]:
    """A section `moe` and any of the top level over a tiny decoder, with experts if it has none."""
    said = yaml.safe_load(snippet)
    moe = laid_over({"experts": EXPERTS}, said.pop("moe"))
    model = {**MODEL, "attention": {"heads": 4}, "moe": moe}
    return {"name": "x", "model": model, **said}


@pytest.mark.parametrize("snippet", snippets("yaml"))
def test_snippets_are_planned(snippet: str) -> None:
    plan = moegen.plan(spec_of(snippet), batch=2, sequence=16)
    assert plan.spec.model.routed()


@pytest.mark.parametrize("snippet", snippets("python"))
def test_snippets_run(snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = moegen.module(tiny_over("switch", 2)).Model()
    ids = torch.randint(256, (2, 16))
    exec(snippet, {"model": model, "ids": ids, "Recorder": Recorder})
    assert capsys.readouterr().out


def test_there_is_a_snippet_for_every_page_but_statistics() -> None:
    without = [p.stem for p in PAGES if "```yaml" not in p.read_text(encoding="utf-8")]
    assert without == ["statistics"]


def test_pages_are_short() -> None:
    for page in PAGES:
        if page.stem != "README":
            assert len(page.read_text(encoding="utf-8").splitlines()) <= 120, page


@cache
def table() -> str:
    """The presets as Markdown."""
    lines = ["| preset | what it is | source | also say |", "|---|---|---|---|"]
    short = {}
    for name in presets.names("moe"):
        told = presets.about("moe", name)
        if str(told.notes).startswith("Short for"):
            short.setdefault(presets.read("moe", name).data["preset"], []).append(name)
    for name in presets.names("moe"):
        told = presets.about("moe", name)
        if any(name in names for names in short.values()):
            continue
        called = ", ".join(f"`{n}`" for n in (name, *short.get(name, ())))
        also = ", ".join(f"`{path}`" for path in asked(SIZES.get(name, {})))
        file = f"../../moegen/presets/moe/{name}.yaml"
        lines.append(f"| {called} | [{told.title}]({file}) | {told.source} | {also} |")
    return "\n".join(lines)


def asked(sizes: Any, path: str = "") -> list[str]:
    """The keys that a preset leaves to its user, the experts' own count and width aside."""
    if not isinstance(sizes, dict):
        return [path] if path not in ("experts.count", "experts.width") else []
    return [
        key
        for name, value in sizes.items()
        for key in asked(value, f"{path}.{name}" if path else name)
    ]


def test_the_table_of_presets_is_theirs() -> None:
    assert between(INDEX, "presets") == table()


def between(text: str, mark: str) -> str:
    return text.partition(f"<!-- {mark}: begin -->\n")[2].partition(f"\n<!-- {mark}: end -->")[0]


def test_links_lead_somewhere() -> None:
    for page in (*PAGES, DOCS / "policies.md"):
        for link in re.findall(r"\]\(([\w./-]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_page_is_in_the_index() -> None:
    assert {p.name for p in PAGES} - {"README.md"} <= set(re.findall(r"\(([\w-]+\.md)\)", INDEX))
