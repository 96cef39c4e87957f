"""The gallery: every page is what its spec, its counts and its results give today."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from examples import gallery
from examples.gallery import GALLERY, ROOT, SPECS, System, index, main, page, systems

SYSTEMS = systems()


@pytest.fixture(scope="module", autouse=True)
def _plans_go() -> Iterator[None]:
    yield
    gallery.planned.cache_clear()


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_a_page_is_current(system: System) -> None:
    file = GALLERY / system.name / "README.md"
    assert file.read_text("utf-8") == page(system), "run: python -m examples.gallery"


def test_the_index_is_current() -> None:
    assert (GALLERY / "README.md").read_text("utf-8") == index(SYSTEMS)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_what_a_page_names_is_there(system: System) -> None:
    text = (GALLERY / system.name / "README.md").read_text("utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (GALLERY / system.name / link).exists(), link
    for module in re.findall(r"python -m examples\.(\w+)", text):
        assert (ROOT / "examples" / f"{module}.py").is_file()
    for name in re.findall(r"moegen build specs/(\S+)", text):
        assert (SPECS / name).is_file()


def test_every_result_is_shown_and_every_family_of_specs() -> None:
    results = {file.parent.name for file in GALLERY.glob("*/results.json")}
    assert results == {system.example for system in SYSTEMS} - {None}
    shown = {gallery.planned(s.specs[0]).spec.family for s in SYSTEMS if s.specs}
    from moegen.report.specs import specs_facts

    families = {row["family"] for row in specs_facts(None, counted=False)}
    assert families - shown == {"others", "vit", "t5"}  # dense ones


def test_a_page_that_is_out_of_date_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "systems", lambda: SYSTEMS[:1])
    monkeypatch.setattr(gallery, "page", lambda system: "another")
    name = Path("docs") / "gallery" / SYSTEMS[0].name / "README.md"
    before = (ROOT / name).read_text("utf-8")
    result = CliRunner().invoke(main, ["--check"])
    assert result.exit_code == 1
    assert f"out of date: {name}" in result.output
    assert (ROOT / name).read_text("utf-8") == before
