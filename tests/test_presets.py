"""Presets: sections laid over shipped files, their places, their names, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preset_specs import tiny_over
from pydantic import Field

import moegen
from moegen.errors import SpecError
from moegen.report.schema import schema_text
from moegen.spec import presets
from moegen.spec.element import Element, Kinds, Path, one_of
from moegen.spec.expand import DEPTH, MOST
from moegen.spec.load import load, load_file, resolved_yaml
from moegen.spec.schema import json_schema
from moegen.spec.source import Source, read, read_text

FUZZ = settings(deadline=None)
SHIPPED = [(section, name) for section in presets.sections() for name in presets.names(section)]

FILES = {
    "moe/switch": "about: {title: S, year: 2021, source: here, notes: few}\n"
    "moe:\n  experts: {count: 4, width: 8}\n  top_k: 1\n  score: {kind: cosine, heat: 2.0}\n",
    "moe/wide": "about: {title: W}\nmoe: {preset: switch, experts: {width: 99}}\n",
    "moe/short": "about: {title: Short}\nmoe: {experts: 16, top_k: 2, score: 5}\n",
    "moe/bad": "about: {title: Bad}\nmoe:\n  experts: {count: 4, width: 7}\n  topk: 1\n",
    "moe/a": "about: {title: A}\nmoe: {preset: b}\n",
    "moe/b": "about: {title: B}\nmoe: {preset: a}\n",
    "moe/inner": "about: {title: I}\nmoe: {preset: switch, rope: {preset: slow, theta: 3.0}}\n",
    "rope/slow": "about: {title: Slow}\nrope: {theta: 1.0, scale: 1.0}\n",
    "rope/fast": "about: {title: Fast}\nrope: {scale: 9.0}\n",
    **{f"deep/d{n}": f"about: {{title: D}}\ndeep: {{preset: d{n + 1}}}\n" for n in range(20)},
    "deep/d20": "about: {title: D}\ndeep: {x: 1}\n",
    "odd/list": "about: {title: L}\nodd: [1]\n",
    "odd/more": "about: {title: M}\nodd: {}\nmodel: {}\n",
    "odd/Upper": "odd: {}\n",
}


class Score(Kinds):
    """How tokens are scored."""

    default_kind = "linear"


class Linear(Score):
    kind: Literal["linear"] = "linear"
    shorthand = "dim"
    dim: int = 8


class Cosine(Score):
    kind: Literal["cosine"] = "cosine"
    heat: float = 1.0


class Experts(Element):
    shorthand = "count"
    count: int = Field(ge=1)
    width: int

    def rules(self) -> Iterator[tuple[Path, str]]:
        if self.width == 7:
            yield ("width",), "width is 7"


class Rope(Element):
    theta: float
    scale: float = 0.0


class Moe(Element):
    experts: Experts
    top_k: int = 3
    score: one_of(Score) = Linear()
    rope: Rope | None = None


class Model(Element):
    moe: Moe


class Root(Element):
    """A whole spec."""

    name: str = "x"
    model: Model


@pytest.fixture
def shelf(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> File:
    for name, text in FILES.items():
        place = tmp_path / "presets" / f"{name}.yaml"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    (tmp_path / "presets/moe/notes.txt").write_text("no preset")
    (tmp_path / "secret.yaml").write_text("about: {title: T}\nmoe: {top_k: 666}\n")
    monkeypatch.setattr(presets, "ROOT", tmp_path / "presets")
    return tmp_path


def source(moe: str, *overrides: str) -> Source:
    return read_text(f"name: x\nmodel:\n  moe: {moe}\n", "t.yaml", overrides, root=Root)


def moe_of(moe: str, *overrides: str) -> Any:
    return source(moe, *overrides).data["model"]["moe"]


def refusal(moe: str, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load(Root, source(moe, *overrides))
    return str(caught.value)


SWITCH = {"experts": {"count": 4, "width": 8}, "top_k": 1, "score": {"kind": "cosine", "heat": 2.0}}


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize(
    ("moe", "changed"),
    [
        ("{preset: switch}", {}),
        ("{preset: switch, top_k: 2}", {"top_k": 2}),
        ("{preset: switch, experts: {width: 9}}", {"experts": {"count": 4, "width": 9}}),
        ("{preset: switch, experts: 32}", {"experts": {"count": 32, "width": 8}}),
        ("{preset: switch, score: linear}", {"score": "linear"}),
        ("{preset: switch, score: {dim: 2}}", {"score": {"kind": "cosine", "heat": 2.0, "dim": 2}}),
        (
            "{preset: switch, score: {kind: linear, dim: 2}}",
            {"score": {"kind": "linear", "dim": 2}},
        ),
        ("{preset: switch, rope: {theta: 1.0}}", {"rope": {"theta": 1.0}}),
        ("{preset: wide}", {"experts": {"count": 4, "width": 99}}),
        ("{preset: wide, experts: 2}", {"experts": {"count": 2, "width": 99}}),
        ("{preset: switch, rope: {preset: slow}}", {"rope": {"theta": 1.0, "scale": 1.0}}),
        ("{preset: inner}", {"rope": {"theta": 3.0, "scale": 1.0}}),
        # A preset that is nearer to a value says it over one that is further away.
        ("{preset: inner, rope: {preset: fast}}", {"rope": {"theta": 3.0, "scale": 9.0}}),
    ],
)
def test_a_section_is_laid_over_its_preset(moe: str, changed: dict[str, Any]):
    assert moe_of(moe) == {**SWITCH, **changed}


@pytest.mark.usefixtures("shelf")
def test_a_preset_in_short_forms():
    assert moe_of("{preset: short, experts: {width: 3}, score: {dim: 6}}") == {
        "experts": {"count": 16, "width": 3},
        "top_k": 2,
        "score": {"dim": 6},
    }


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("none", ["none", "null", "~", ""])
def test_no_preset(none: str):
    assert moe_of(f"{{preset: {none}, top_k: 5}}") == {"top_k": 5}


@pytest.mark.usefixtures("shelf")
def test_overrides_set_presets_and_win_over_them():
    assert moe_of("{top_k: 2}", "moe.preset=switch") == {**SWITCH, "top_k": 2}
    assert moe_of("{preset: short}", "moe.preset=switch") == SWITCH
    assert moe_of("{preset: switch, top_k: 2}", "moe.preset=none") == {"top_k": 2}
    changes = ("moe.experts=64", "moe.top_k=9", "moe.score.heat=3.0")
    assert moe_of("{preset: switch}", *changes) == {
        "experts": {"count": 64, "width": 8},
        "top_k": 9,
        "score": {"kind": "cosine", "heat": 3.0},
    }
    assert moe_of("{top_k: 2}", "moe={preset: switch, experts: 5}", "moe.top_k=8") == {
        **SWITCH,
        "experts": {"count": 5, "width": 8},
        "top_k": 8,
    }


def test_presets_of_bases(shelf: File):
    (shelf / "base.yaml").write_text("model: {moe: {preset: switch, top_k: 2}}\n")
    (shelf / "same.yaml").write_text("extends: base.yaml\nmodel: {moe: {experts: 6}}\n")
    (shelf / "other.yaml").write_text("extends: base.yaml\nmodel: {moe: {preset: short}}\n")
    (shelf / "none.yaml").write_text("extends: base.yaml\nmodel: {moe: {preset: none}}\n")
    found = {
        name: read(shelf / f"{name}.yaml", root=Root).data["model"]["moe"]
        for name in ("same", "other", "none")
    }
    assert found["same"] == {**SWITCH, "experts": {"count": 6, "width": 8}, "top_k": 2}
    assert found["other"] == {"experts": 16, "top_k": 2, "score": 5}
    assert found["none"] == {"top_k": 2}


def test_places(shelf: File):
    (shelf / "t.yaml").write_text("model:\n  moe:\n    preset: wide\n    experts: 2\n")
    found = load_file(Root, shelf / "t.yaml")
    marks = {
        path[2:]: (File(mark.file).name, mark.line, mark.via.line if mark.via else None)
        for path, mark in found.marks.items()
        if path[:2] == ("model", "moe")
    }
    assert marks == {
        (): ("t.yaml", 2, None),
        ("experts",): ("t.yaml", 4, None),
        ("experts", "count"): ("t.yaml", 4, None),
        ("experts", "width"): ("wide", 2, 3),
        ("top_k",): ("switch", 4, 2),
        ("score",): ("switch", 5, 2),
        ("score", "kind"): ("switch", 5, 2),
        ("score", "heat"): ("switch", 5, 2),
    }
    mark = found.mark(("model", "moe", "top_k"))
    assert mark is not None
    assert mark.via is not None
    assert (mark.file, mark.via.file) == ("preset moe/switch", "preset moe/wide")
    assert str(shelf) not in mark.file + mark.via.file


@pytest.mark.usefixtures("shelf")
def test_what_is_wrong_in_a_preset_points_into_it():
    assert refusal("{preset: bad}") == (
        "preset moe/bad:3:23: error: width is 7\n"
        "  from preset moe/bad at t.yaml:3\n"
        "     3 |   experts: {count: 4, width: 7}\n"
        "       |                       ^ model.moe.experts.width\n"
        "preset moe/bad:4:3: error: unknown key 'topk'; did you mean 'top_k'?\n"
        "  from preset moe/bad at t.yaml:3\n"
        "     4 |   topk: 1\n"
        "       |   ^ model.moe.topk"
    )
    report = refusal("{preset: switch, experts: {count: a}}")
    assert report.startswith("t.yaml:3:35: error: experts.count must be a whole number")
    report = refusal("{top_k: a}", "moe.preset=wide", "moe.experts.width=7")
    assert "-o:1:1: error: width is 7" in report
    report = refusal("{preset: wide, experts: {count: 1}}", "moe.score.heat=x")
    assert "from" not in report


@pytest.mark.usefixtures("shelf")
def test_a_preset_of_a_preset_names_the_whole_way(shelf: File):
    (shelf / "presets/moe/wide.yaml").write_text(
        "about: {title: W}\nmoe: {preset: switch, experts: {count: 0}}\n"
    )
    (shelf / "presets/moe/over.yaml").write_text("about: {title: O}\nmoe:\n  preset: wide\n")
    assert (
        "  from preset moe/wide at preset moe/over:3\n  from preset moe/over at -o:1\n"
    ) in refusal("{}", "moe.preset=over")


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ("{preset: swich}", "t.yaml:3:9: error: no preset of moe is called 'swich'; did you mean"),
        ("{preset: swich}", "'switch'?\n  presets of moe: a, b, bad, inner, short, switch, wide\n"),
        ("{preset: [1]}", "t.yaml:3:9: error: preset is the name of one, not a list"),
        ("{preset: {a: 1}}", "not a section"),
        ("{preset: 7}", "not 7"),
        ("{preset: true}", "not true"),
        ("{preset: ''}", "no preset of moe is called ''"),
        ("{preset: ../secret}", "no preset of moe is called '../secret'"),
        ("{preset: ../moe/switch}", "no preset of moe is called"),
        ("{preset: /etc/passwd}", "no preset of moe is called"),
        ("{preset: switch.yaml}", "did you mean 'switch'?"),
        ("{preset: SWITCH}", "did you mean 'switch'?"),
        ("{preset: notes}", "no preset of moe is called 'notes'"),
        ("{preset: a}", "presets go in a circle: moe/a -> moe/b -> moe/a"),
        ("{deep: {preset: d0}}", f"presets are more than {DEPTH} deep"),
        ("{odd: {preset: list}}", "preset odd/list:2:1: error: a preset has the keys 'about' and"),
        ("{odd: {preset: more}}", "preset odd/more:3:1: error: a preset has the keys 'about' and"),
        ("{odd: {preset: Upper}}", "presets of odd: list, more\n"),
        ("{experts: {preset: switch}}", "unknown key 'preset' here; presets are for deep, moe,"),
        ("{experts: {preset: switch}}", "t.yaml:3:19: error: "),
        ("{rope: [{a: {preset: slow}}]}", "unknown key 'preset' here"),
        ("{../moe: {preset: switch}}", "unknown key 'preset' here"),
        ("{.: {preset: switch}}", "unknown key 'preset' here"),
    ],
)
def test_refused(moe: str, said: str):
    report = refusal(moe)
    assert said in report
    assert report.count("error:") == 1


@pytest.mark.usefixtures("shelf")
def test_a_misspelt_key_may_mean_preset():
    report = refusal("{prest: switch, experts: {count: 1, width: 2, prest: 1}}")
    assert report.count("did you mean 'preset'?") == 1
    assert "t.yaml:3:9: error: unknown key 'prest'; did you mean 'preset'?" in report


@pytest.mark.usefixtures("shelf")
def test_the_top_level_has_none():
    with pytest.raises(SpecError, match=r"t\.yaml:1:1: error: unknown key 'preset' here"):
        read_text("preset: switch", "t.yaml")


@pytest.mark.usefixtures("shelf")
def test_all_problems_at_once():
    report = refusal("{preset: swich, rope: {preset: sloow}, experts: {preset: 1}}")
    assert report.count("error:") == 3


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("name", ["switch", "swithc", "[1]", "a"])
def test_many_presets_end(name: str):
    body = "".join(f"  k{n}: {{moe: {{preset: {name}}}}}\n" for n in range(1400))
    with pytest.raises(SpecError) as caught:
        read_text(f"model:\n{body}", "t.yaml")
    messages = [problem.message for problem in caught.value.problems]
    assert messages.count(f"a spec names at most {MOST} presets") == 1
    assert len(messages) <= MOST + 1


@pytest.mark.usefixtures("shelf")
@FUZZ
@given(st.text(alphabet="abcswith./\\-~%:0 \u202e\n'\"[]{}\t"), st.sampled_from(["moe", "..", "/"]))
def test_any_name_is_a_preset_or_refused(name: str, section: str):
    text = resolved_yaml({"model": {section: {"preset": name}}})
    try:
        found = str(read_text(text).data)
    except SpecError as error:
        found = str(error)
    assert "666" not in found  # what the file beside the presets says


@pytest.mark.usefixtures("shelf")
def test_what_is_known_of_presets():
    assert presets.sections() == ["deep", "moe", "odd", "rope"]
    assert presets.names("rope") == ["fast", "slow"]
    assert presets.names("nowhere") == presets.names("../presets/moe") == presets.names("") == []
    told = presets.about("moe", "switch")
    assert (told.title, told.year, told.source, told.notes) == ("S", 2021, "here", "few")
    assert presets.read("moe", "switch").data == SWITCH
    for function in (presets.about, presets.read):
        with pytest.raises(SpecError, match="no preset of moe is called 'swich'"):
            function("moe", "swich")


def test_some_are_shipped():
    assert {"mixtral-8x7b", "switch-base"} <= set(presets.names("moe"))


@pytest.mark.parametrize(("section", "name"), SHIPPED)
def test_shipped_presets_say_what_they_are(section: str, name: str):
    told = presets.about(section, name)
    assert told.title
    assert told.year is None or 1980 < told.year < 2100
    assert presets.read(section, name).data


@pytest.mark.parametrize("name", presets.names("moe"))
def test_shipped_presets_of_moe_make_models(name: str):
    assert moegen.plan(tiny_over(name), batch=1, sequence=8).root.totals()


def test_packages_hold_what_presets_say(tmp_path: File):
    folder = moegen.build(tiny_over("switch-base"), tmp_path / "x", {"moe.experts": 8})
    text = (folder / "spec.yaml").read_text(encoding="utf-8")
    assert "preset" not in text
    assert "about" not in text
    spec = moegen.load(folder / "spec.yaml").spec
    assert spec == moegen.load(tiny_over("switch-base"), {"moe.experts": 8}).spec
    assert spec.model.moe is not None
    assert (spec.model.moe.experts.count, spec.model.moe.experts.width) == (8, 32)
    assert moegen.check(folder) == []


def test_the_schema_knows_the_names():
    schema = json.loads(schema_text())
    names = schema["$defs"]["PartialMoE"]["properties"]["preset"]["enum"]
    assert names == [*presets.names("moe"), "none", None]
    assert "preset" not in schema["$defs"]["MoE"]["properties"]


@pytest.mark.usefixtures("shelf")
def test_the_schema_requires_nothing_over_a_preset():
    definitions = json_schema(Root)["$defs"]
    assert definitions["Model"]["properties"]["moe"] == {
        "anyOf": [
            {"$ref": "#/$defs/Moe"},
            {"$ref": "#/$defs/PartialMoe", "required": ["preset"]},
        ]
    }
    assert definitions["Experts"]["anyOf"][0]["required"] == ["count", "width"]
    partial = {name: body for name, body in definitions.items() if name.startswith("Partial")}
    names = ("Moe", "Experts", "Score", "Linear", "Cosine", "Rope")
    assert set(partial) == {f"Partial{n}" for n in names}
    assert "required" not in json.dumps(partial)
    properties = partial["PartialMoe"]["properties"]
    assert properties["preset"]["enum"] == [*presets.names("moe"), "none", None]
    assert partial["PartialRope"]["properties"]["preset"]["enum"] == ["fast", "slow", "none", None]
    assert properties["experts"] == {"$ref": "#/$defs/PartialExperts"}
    assert "preset" not in definitions["Rope"]["properties"]
    assert json_schema(Root)["$defs"] == definitions
