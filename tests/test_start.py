"""`moegen new`: a spec of one's own from another, alone in its file, meaning the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import moegen
from moegen.cli import cli
from moegen.spec.start import DROPPED, started

SPECS = Path(__file__).parent.parent / "specs"
FILES = sorted(SPECS.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_started_spec_is_the_same_model_under_another_name(file: Path, tmp_path: Path) -> None:
    place = tmp_path / "mine.yaml"
    place.write_text(started(file, "mine"), encoding="utf-8")
    mine, other = moegen.load(place), moegen.load(file)
    assert mine.spec.name == "mine"
    assert mine.files == (str(place),)
    assert not mine.data.keys() & set(DROPPED)
    for section in ("model", "precision", "init", "train"):
        assert getattr(mine.spec, section) == getattr(other.spec, section)


def test_comments_of_what_is_kept_stay() -> None:
    text = started(SPECS / "mixtral-8x7b.yaml", "null")
    assert "# The paper names no loss" in text
    assert "yaml-language-server" not in text
    assert "name: 'null'\n" in text


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = str(SPECS / "tiny.yaml")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 2) -> str:
        result = CliRunner().invoke(cli, ["new", *arguments])
        assert result.exit_code == code
        return result.output

    run("mine", "--from", tiny, code=0)
    before = (tmp_path / "mine.yaml").read_text("utf-8")
    assert "mine.yaml exists" in run("mine", "--from", tiny)
    assert (tmp_path / "mine.yaml").read_text("utf-8") == before
    assert "no path separators" in run("../mine", "--from", tiny)
    assert "tinny" in run("other", "--from", "tinny")
    assert "cannot write" in run("other", "--from", tiny, "--out", "no/where.yaml")
