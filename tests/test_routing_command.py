"""`moegen routing`: every part, kind and preset is listed, told and written as YAML that holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from moegen.arch.losses.auxiliary import AuxiliaryLoss
from moegen.arch.moe import MoE
from moegen.arch.routing.router import Router
from moegen.arch.routing.score import Score
from moegen.cli import cli
from moegen.report.parts import written
from moegen.report.vocabulary import facts, fields_of, find, kind_of, parts
from moegen.spec import presets
from moegen.spec.element import Element, Kinds, OneOf
from moegen.spec.shape import slots_inside

TINY = str(Path(__file__).parent.parent / "specs" / "tiny.yaml")
ELEMENTS = [(part, element) for part in parts() for element in part.elements]
NAMES = [f"{part.name}.{kind_of(element) or ''}".strip(".") for part, element in ELEMENTS]


def run(*arguments: str, code: int = 0, width: int = 100) -> str:
    result = CliRunner().invoke(cli, ["routing", *arguments], env={"COLUMNS": str(width)})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_parts_are_in_a_tokens_order() -> None:
    names = [part.name for part in parts()]
    inner = ["moe", *(f"router.{name}" for name in Router.model_fields)]
    inner.insert(inner.index("router.select") + 1, "router.select.second")
    assert names[: len(inner)] == inner
    after = [name for name in names[len(inner) :] if "." not in name]
    assert after == ["capacity", "experts", "shared", "residual", "extra", "losses"]


def test_every_family_of_the_routed_layer_is_listed_with_all_its_members() -> None:
    families: set[type[Kinds]] = set()
    waiting: list[type[Element]] = [MoE]
    for element in waiting:  # grows on the way
        for info in element.model_fields.values():
            for slot in slots_inside(info.annotation, info.metadata):
                below: list[Any] = []
                if isinstance(slot.type, OneOf):
                    families.add(slot.type.family)
                    below = list(slot.type.family.members.values())
                elif isinstance(slot.type, type) and issubclass(slot.type, Element):
                    below = [slot.type]
                waiting += [one for one in below if one not in waiting]
    listed = {part.family: set(part.elements) for part in parts() if part.family}
    assert listed == {family: set(family.members.values()) for family in families}


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_keeps_to_the_width(width: int) -> None:
    text = run(width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for part in parts():
        assert f"\n{part.name}: " in text
    for preset in presets.names("moe"):
        assert f"\n{preset} " in text


@pytest.mark.parametrize(("part", "element"), ELEMENTS, ids=NAMES)
def test_what_is_written_is_valid(part: Any, element: type[Element]) -> None:
    text = written(part, element)
    assert max(map(len, text.splitlines())) <= 100
    value: Any = yaml.safe_load(text)["model"]["moe"]
    for key in part.path:
        value = value[key]
    if part.path == ("losses",):
        (kind,) = value
        assert issubclass(element, AuxiliaryLoss)
        value = {"kind": kind, **value[kind]}
    if element is not MoE:
        element.model_validate(value or {})
    for name in fields_of(element):
        assert f"{name}: " in text


@pytest.mark.parametrize("name", ["score", "cosine", "score.cosine", "router.score.cosine"])
def test_a_part_and_a_kind_are_told(name: str) -> None:
    text = run(name)
    assert "router.score" in text
    assert "kind: " in text
    assert ("learned" in text) == (name != "score") or "linear" in text


def test_a_name_of_several_tells_all() -> None:
    text = run("gaussian")
    assert "router.score, kind gaussian" in text
    assert "router.noise, kind gaussian" in text


def test_a_kind_names_the_presets_that_have_it() -> None:
    text = " ".join(run("cosine").split())
    assert "In presets: gmoe" in text
    assert "x-moe" in text


@pytest.mark.parametrize("name", presets.names("moe"))
def test_presets_are_printed_as_they_are(name: str) -> None:
    text = run(name)
    assert presets.text("moe", name) in text
    about = presets.about("moe", name)
    assert about.title in " ".join(text.split())
    if about.source:
        assert "Source: " in text


@pytest.mark.parametrize(
    ("name", "meant"), [("cosin", "cosine"), ("swich-base", "switch-base"), ("capacty", "capacity")]
)
def test_an_unknown_name_is_told_the_nearest(name: str, meant: str) -> None:
    text = run(name, code=2)
    assert f"no part of a router and no preset is called '{name}'; did you mean '{meant}'?" in text
    assert "`moegen routing` lists all of them" in text


def test_json_is_complete() -> None:
    found = json.loads(run("--json"))
    assert found == facts(None)
    score = next(part for part in found["parts"] if part["part"] == "router.score")
    assert score["default"] == "linear"
    assert {kind["kind"] for kind in score["kinds"]} == set(Score.members)
    cosine = next(kind for kind in score["kinds"] if kind["kind"] == "cosine")
    start = next(field for field in cosine["fields"] if field["name"] == "start")
    assert start == {
        "name": "start",
        "required": False,
        "default": 0.07,
        "expects": "a number above 0 and at most 10000",
        "description": "t at the start; for exp, e^-t",
    }
    assert {preset["name"] for preset in found["presets"]} == set(presets.names("moe"))


def test_json_of_a_name() -> None:
    found = json.loads(run("switch-base", "--json"))
    assert found["parts"] == []
    assert found["presets"][0]["yaml"] == presets.text("moe", "switch-base")
    assert [len(part["kinds"]) for part in json.loads(run("cosine", "--json"))["parts"]] == [1]


def test_a_name_that_is_a_part_is_not_also_its_kinds() -> None:
    found, named = find("select")
    assert [part.name for part in found] == ["router.select"]
    assert named == []


PLUGIN = '''
from typing import Literal
import torch.nn.functional as F
from pydantic import Field
from moegen.arch.routing.affinity import Affinity

class Softplus(Affinity):
    """Experts are judged alone, without an upper bound."""
    kind: Literal["softplus"] = "softplus"
    sharpness: float = Field(1.0, gt=0, description="how sharply scores bend at zero")
    def scores(self, b, logits, site):
        return F.softplus(logits, beta=self.sharpness)
'''


def test_a_plug_in_is_listed_and_speaks_for_itself(tmp_path: Path) -> None:
    """Registers for good, so in a process of its own."""
    (tmp_path / "mine.py").write_text(PLUGIN)

    def moegen(*arguments: str) -> str:
        command = [sys.executable, "-m", "moegen", "--import", "mine.py", *arguments]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "COLUMNS": "100"},
        )
        return done.stdout

    assert "how sharply scores bend at zero" in moegen("routing", "softplus")
    assert "\nsoftplus " in moegen("routing", "affinity")
    told = moegen("show", "--routing", TINY, "-o", "moe.router.affinity=softplus")
    assert "Experts are judged alone, without an upper bound." in told
