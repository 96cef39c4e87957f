"""Data to elements, errors in plain words, the way back to YAML, and the JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from moegen.errors import SpecError
from moegen.spec.element import Element, Kinds, Path, one_of
from moegen.spec.load import load, load_file, resolved_yaml
from moegen.spec.merge import merge
from moegen.spec.scan import FORBIDDEN
from moegen.spec.schema import json_schema
from moegen.spec.source import read, read_text
from moegen.spec.tree import Tree, parse

FUZZ = settings(deadline=None)


class Score(Kinds):
    """How tokens are scored."""

    default_kind = "linear"


class Linear(Score):
    """A linear map."""

    kind: Literal["linear"] = "linear"
    shorthand = "dim"
    dim: int = Field(8, ge=1, le=64)
    inner: one_of(Score, optional=True) = None


class Cosine(Score):
    kind: Literal["cosine"] = "cosine"
    temperature: float = Field(1.0, gt=0)


class Experts(Element):
    shorthand = "count"
    count: int = Field(ge=1, description="how many experts there are")
    width: int | None = None


class Rope(Element):
    theta: float = 10000.0


class Attention(Element):
    heads: int = 4
    rope: Rope = Rope()


class Part(Kinds):
    """A family without a default: a key names the kind."""


class Small(Part):
    kind: Literal["small"] = "small"
    shorthand = "weight"
    weight: float = Field(1.0, gt=0, le=8.0)


class Moe(Element):
    experts: Experts
    top_k: int = Field(2, gt=0)
    score: one_of(Score) = Field(default=Linear(), description="how tokens are scored")
    noise: one_of(Score, optional=True) = None
    stack: tuple[one_of(Score), ...] = ()
    layers: tuple[int, ...] = ()
    overrides: dict[int, Experts] = {}
    capacity: float | Literal["none"] = "none"
    normalize: bool = False
    parts: dict[str, one_of(Part)] = {}
    mode: Literal["train", "prefill", "decode"] = "train"

    def rules(self) -> Iterator[tuple[Path, str]]:
        if self.top_k > self.experts.count:
            yield ("top_k",), f"top_k is {self.top_k} but there are {self.experts.count} experts"
        if self.experts.width == 7:
            yield ("experts", "width"), "width is 7"


class Model(Element):
    vocab_size: int = Field(100, description="entries of the vocabulary")
    attention: Attention = Attention()
    moe: Moe


class Root(Element):
    """A whole spec."""

    name: str
    model: Model


def loaded(moe: str, *overrides: str) -> Root:
    return load(Root, read_text(f"name: x\nmodel:\n  moe: {moe}\n", "t.yaml", overrides))


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load(Root, read_text(text, "t.yaml", overrides))
    return str(caught.value)


def moe_refusal(moe: str, *overrides: str) -> str:
    return refusal(f"name: x\nmodel:\n  moe: {moe}\n", *overrides)


def test_a_good_spec():
    text = "{experts: 8, score: {kind: cosine, temperature: 2}, noise: none, layers: [1, 2]}"
    moe = loaded(text).model.moe
    assert moe == Moe(
        experts=Experts(count=8), score=Cosine(temperature=2.0), noise=None, layers=(1, 2)
    )
    assert loaded("{experts: 8, score: 5}").model.moe.score == Linear(dim=5)
    assert loaded("{experts: 8, overrides: {'3': 4}}").model.moe.overrides == {3: Experts(count=4)}


def test_the_exact_report():
    assert moe_refusal("\n    expert: 8\n    top_k: 2") == (
        "t.yaml:4:5: error: unknown key 'expert'; did you mean 'experts'?\n"
        "     4 |     expert: 8\n"
        "       |     ^ model.moe.expert"
    )


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ("{experts: eight}", "experts.count must be a whole number of at least 1, not 'eight'"),
        ("{experts: 0}", "experts.count must be a whole number of at least 1, not 0"),
        ("{experts: 8.0}", "not 8.0; write 8"),
        ("{experts: true}", "not true"),
        ("{experts: '8'}", "not '8'; write 8 without quotes"),
        ("{experts: 017}", "not '017'; write 17"),
        ("{experts: 1_000}", "not '1_000'; write 1000"),
        ("{experts: 0x10}", "not '0x10'; write 16"),
        ("{experts: 1e3}", "not 1000.0; write 1000"),
        ("{experts: {}}", "moe.experts needs 'count': how many experts there are"),
        ("{}", "model.moe needs 'experts'"),
        ("{experts: 8, top_k: 0}", "moe.top_k must be a whole number of at least 1, not 0"),
        ("{experts: 8, score: {dim: 65}}", "must be a whole number from 1 to 64, not 65"),
        ("{experts: 8, score: {kind: cosine, temperature: 0}}", "must be a number above 0, not 0"),
        ("{experts: 8, normalize: yes}", "must be true or false, not 'yes'; write true"),
        ("{experts: 8, normalize: 1}", "must be true or false, not 1"),
        ("{experts: 8, layers: 3}", "moe.layers must be a list, not 3"),
        ("{experts: 8, layers: [1, x]}", "moe.layers[1] must be a whole number, not 'x'"),
        ("{experts: 8, capacity: non}", "a number or 'none', not 'non'; did you mean 'none'?"),
        ("{experts: 8, mode: trian}", "one of 'train', 'prefill' or 'decode', not 'trian'"),
        ("{experts: 8, mode: trian}", "did you mean 'train'?"),
        ("{experts: 8, score: linaer}", "no score is called 'linaer'; did you mean 'linear'?"),
        ("{experts: 8, score: {kind: zzz}}", "called 'zzz'; known: cosine and linear"),
        ("{experts: 8, score: {kind: [1]}}", "no score is called"),
        ("{experts: 8, score: null}", "moe.score must be a score (a name or a section), not null"),
        ("{experts: 8, score: [a]}", "not a list"),
        ("{experts: 8, stack: [linear, {kind: q}]}", "model.moe.stack.1.kind"),
        ("{experts: 8, noise: {inner: {inner: {dim: 0}}}}", "model.moe.noise.inner.inner.dim"),
        ("{experts: 8, theta: 5}", "unknown key 'theta' here; it belongs in model.attention.rope"),
        ("{experts: 8, name: x}", "unknown key 'name' here; it belongs in the top level"),
        ("{experts: 8, score: {temperature: 1}}", "it belongs to kind 'cosine'"),
        ("{experts:8}", "write a space after 'experts:'"),
        ("{experts: 8, zzz: 1}", "the keys here are capacity, experts, layers, mode, noise"),
        ("{experts: 8, overrides: {x: 4}}", "a key of moe.overrides must be a whole number"),
        ("{experts: 8, overrides: {'3': {count: 0}}}", "model.moe.overrides.3.count"),
        ("{experts: 8, parts: {x: {kind: smal}}}", "did you mean 'small'?"),
        ("{experts: 8, parts: {x: {kind: small, wieght: 1}}}", "did you mean 'weight'?"),
        ("{experts: 8, parts: {x: {kind: small, weight: 9}}}", "a number above 0 and at most 8"),
        ("7", "model.moe must be a section, not 7"),
        ("null", "model.moe must be a section, not null"),
    ],
)
def test_errors_in_plain_words(moe: str, said: str):
    report = moe_refusal(moe)
    assert said in report
    assert report.count("error:") == 1
    assert "Input should" not in report


def test_text_where_a_number_stands():
    assert 'name must be text, not 17; write "17"' in refusal(
        "name: 17\nmodel: {moe: {experts: 1}}"
    )


def test_missing_points_to_its_section():
    assert refusal("name: x\nmodel:\n  attention: {}\n") == (
        "t.yaml:2:1: error: model needs 'moe': a section\n     2 | model:\n       | ^ model"
    )
    assert "t.yaml:1:1: error: the spec needs 'name'" in refusal("model: {moe: {experts: 1}}")


def test_rules_blame_their_fields():
    report = moe_refusal("{experts: {count: 2, width: 7}, top_k: 3}")
    assert "t.yaml:3:29: error: width is 7\n" in report
    assert "t.yaml:3:40: error: top_k is 3 but there are 2 experts" in report
    report = moe_refusal("{experts: 2}", "moe.top_k=9")
    assert report == (
        "-o:1:1: error: top_k is 9 but there are 2 experts\n"
        "     1 | moe.top_k=9\n"
        "       | ^ model.moe.top_k"
    )


def test_all_problems_at_once():
    assert moe_refusal("{experts: a, top_k: b, mode: c, zzz: d, score: e}").count("error:") == 5


def test_thousands_of_problems():
    moe = ", ".join(f"k{n}: 1" for n in range(4000))
    report = moe_refusal(f"{{experts: 8, {moe}}}")
    assert report.endswith("... and 3980 more")
    assert "Extra inputs" not in report


def test_hostile_values_are_shown_short():
    report = moe_refusal(f'{{experts: "{"x" * 5000}", mode: "a\\nb\\t\'\\"", score: {"y" * 5000}}}')
    assert len(report) < 1500
    assert repr("a\nb\t'\"") in report


def test_inherited_problems_point_into_the_base(tmp_path: File):
    (tmp_path / "base.yaml").write_text("name: x\nmodel: {moe: {experts: 2, top_k: 0}}\n")
    (tmp_path / "t.yaml").write_text("extends: base.yaml\nmodel: {moe: {experts: 4}}\n")
    with pytest.raises(SpecError) as caught:
        load_file(Root, tmp_path / "t.yaml")
    [problem] = caught.value.problems
    assert problem.mark is not None
    assert File(problem.mark.file).name == "base.yaml"
    assert problem.path == ("model", "moe", "top_k")


def test_loaded_keeps_places(tmp_path: File):
    (tmp_path / "t.yaml").write_text("name: x\nmodel: {moe: {experts: 4}}\n")
    found = load_file(Root, tmp_path / "t.yaml", ["moe.top_k=1"])
    assert found.spec.model.moe.top_k == 1
    problem = found.problem(("model", "moe", "experts", "width"), "too wide", note="traced")
    assert problem.mark is not None
    assert (problem.mark.line, problem.mark.column) == (2, 15)
    assert found.mark(("model", "moe", "top_k")).file == "-o"  # type: ignore[union-attr]


LONG = "{experts: {count: 8, width: 64}, score: {kind: cosine, temperature: 2}, noise: {dim: 4}}"


@pytest.mark.parametrize(
    ("changes", "section", "found"),
    [
        (["moe.experts=16"], "experts", {"count": 16, "width": 64}),
        (["moe.experts=16", "moe.experts.width=3"], "experts", {"count": 16, "width": 3}),
        (["moe.experts=eight"], "experts", {"count": "eight", "width": 64}),
        (["moe.experts={count: 16}"], "experts", {"count": 16}),
        (["moe.experts=[1]"], "experts", [1]),
        (["moe.experts=null"], "experts", None),
        (["moe.experts=none"], "experts", "none"),
        (["moe.experts=0"], "experts", 0),
        (["moe.score=cosine"], "score", {"kind": "cosine", "temperature": 2}),
        (["moe.score=linear"], "score", "linear"),
        (["moe.score=5"], "score", 5),
        (["moe.score=linear", "moe.score.dim=3"], "score", {"kind": "linear", "dim": 3}),
        (["moe.noise=5"], "noise", {"dim": 5}),
        (["moe.noise=cosine"], "noise", "cosine"),
        (["moe.noise=none"], "noise", "none"),
        (["moe.noise=true"], "noise", True),
        (
            ["moe.parts={small: {weight: 1}}", "moe.parts.small=2"],
            "parts",
            {"small": {"weight": 2}},
        ),
        (["moe.parts.small=none"], "parts", {"small": "none"}),
        (["moe.capacity=2", "moe.capacity=none"], "capacity", "none"),
        (
            ["moe.stack=[5]", "moe.stack.0.inner=cosine", "moe.stack.0.inner.temperature=3"],
            "stack",
            [{"dim": 5, "inner": {"kind": "cosine", "temperature": 3}}],
        ),
    ],
)
def test_a_short_form_is_put_into_the_section_that_is_there(
    changes: list[str], section: str, found: Any
):
    source = read_text(f"name: x\nmodel:\n  moe: {LONG}\n", "t.yaml", changes, root=Root)
    assert source.data["model"]["moe"][section] == found


def test_short_forms_in_overrides_keep_their_places():
    text = f"name: x\nmodel:\n  moe: {LONG}\n"
    source = read_text(text, "t.yaml", ["moe.experts=0.5"], root=Root)
    with pytest.raises(SpecError) as caught:
        load(Root, source)
    assert str(caught.value) == (
        "-o:1:1: error: experts.count must be a whole number of at least 1, not 0.5\n"
        "     1 | moe.experts=0.5\n"
        "       | ^ model.moe.experts.count"
    )
    source = read_text(text, "t.yaml", ["moe.capacity=2"], root=Root)
    with pytest.raises(SpecError, match="capacity is 2, a single value with no keys below it"):
        read_text(resolved_yaml(source.data), overrides=["moe.capacity.factor=1"], root=Root)


@pytest.mark.parametrize(
    ("base", "over", "found"),
    [
        ("experts: {count: 8, width: 64}", "experts: 16", {"count": 16, "width": 64}),
        ("experts: 8", "experts: {width: 64}", {"count": 8, "width": 64}),
        ("experts: 8", "experts: 16", 16),
        ("experts: {count: 8}", "experts: null", None),
        (
            "score: {dim: 3, inner: linear}",
            "score: 5",
            {"dim": 5, "inner": "linear"},
        ),
        ("score: {dim: 3}", "score: linear", {"kind": "linear", "dim": 3}),
        ("score: 5", "score: {inner: linear}", {"dim": 5, "inner": "linear"}),
        # Another kind, also where it is not written.
        ("score: {dim: 3}", "score: cosine", "cosine"),
        ("score: {dim: 3}", "score: {kind: cosine}", {"kind": "cosine"}),
        ("score: {dim: 3}", "score: {kind: linear}", {"kind": "linear", "dim": 3}),
        ("score: 5", "score: {kind: cosine}", {"kind": "cosine"}),
        ("score: cosine", "score: {kind: linear, dim: 2}", {"kind": "linear", "dim": 2}),
        ("score: cosine", "score: {temperature: 2}", {"kind": "cosine", "temperature": 2}),
        ("score: {kind: cosine, temperature: 2}", "score: 5", 5),
        (
            "score: {inner: {dim: 3}}",
            "score: {inner: {kind: cosine}}",
            {"inner": {"kind": "cosine"}},
        ),
        ("noise: none", "noise: {dim: 3}", {"dim": 3}),
        ("noise: {dim: 3}", "noise: none", "none"),
        (
            "parts: {small: {weight: 1}}",
            "parts: {small: 2}",
            {"small": {"weight": 2}},
        ),
        ("parts: {small: {weight: 1}}", "parts: {small: 0}", {"small": 0}),
    ],
)
def test_short_forms_and_kinds_in_what_is_extended(
    tmp_path: File, base: str, over: str, found: Any
):
    (tmp_path / "base.yaml").write_text(f"model:\n  moe:\n    {base}\n")
    (tmp_path / "t.yaml").write_text(f"extends: base.yaml\nmodel:\n  moe:\n\n    {over}\n")
    source = read(tmp_path / "t.yaml", root=Root)
    (section,) = source.data["model"]["moe"]
    assert source.data["model"]["moe"][section] == found
    places = {mark.line: File(mark.file).name for mark in source.marks.values()}
    assert places[5] == "t.yaml"
    below = ("model", "moe", section)
    for path, mark in source.marks.items():
        value: Any = source.data
        for key in path:
            value = value[key]
        if path[:3] == below and isinstance(value, (int, str)):
            assert str(value) in mark.text


TEXTS = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda s: not FORBIDDEN.search(s))
SCALARS = (
    TEXTS
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.none()
    | st.sampled_from(["1e-4", "yes", "017", "12:30", "~", "<<", ".inf", "- a", "a: b", "", "1_0"])
)
KEYS = TEXTS.filter(lambda key: key not in ("extends", "preset"))  # what reading acts on
DATA = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@FUZZ
@given(st.dictionaries(KEYS, DATA, max_size=5))
def test_dumped_data_reads_the_same(data: dict[str, Any]):
    text = resolved_yaml(data)
    found = read_text(text).data
    assert repr(found) == repr(data)  # types and order as well
    assert resolved_yaml(found) == text


def test_a_resolved_spec_loads_the_same():
    source = read_text("name: '1e-4'\nmodel: {moe: {experts: 4}}\n", overrides=["moe.top_k=1"])
    text = resolved_yaml(source.data)
    assert load(Root, read_text(text)) == load(Root, source)
    assert text == "name: '1e-4'\nmodel:\n  moe:\n    experts: 4\n    top_k: 1\n"


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from([*Moe.model_fields, "expert", "kind", "theta"]), DATA, max_size=6
    )
)
def test_any_data_is_loaded_or_refused(moe: dict[str, Any]):
    text = resolved_yaml({"name": "x", "model": {"moe": moe}})
    try:
        spec: Root | None = load(Root, read_text(text))
    except SpecError as error:
        spec = None
        report = str(error)
    assert isinstance(spec, Root) or report.startswith("<text>:")


SHORT = st.sampled_from([5, 2.0, "linear", "cosine", "small", "none", None, 0, True, [3], {}])
MOE = st.recursive(
    SHORT,
    lambda inner: st.dictionaries(
        st.sampled_from(["kind", "experts", "count", "score", "inner", "dim", "parts", "small"]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)


@FUZZ
@given(MOE, MOE, MOE)
def test_any_data_is_laid_over_any(first: Any, second: Any, third: Any):
    def tree(moe: Any) -> Tree:
        return parse(resolved_yaml({"model": {"moe": moe}}), "t.yaml")

    merged = merge(merge(tree(first), tree(second), Root), tree(third), Root)
    for path in merged.marks:
        value = merged.data
        for key in path:
            value = value[key]
    text = resolved_yaml(merged.data)
    again = read_text(text, overrides=[f"model.moe={json.dumps(second)}"], root=Root)
    assert again.data["model"]["moe"] == second or not isinstance(second, dict)
    # Once laid over, what it says stays as it is.
    assert merge(merged, tree(third), Root).data == merged.data


def references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from references(part)


def test_json_schema():
    schema = json_schema(Root)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert (schema["title"], schema["description"]) == ("Root", "A whole spec.")
    assert set(schema["properties"]) == {"extends", "name", "model"}
    definitions = schema["$defs"]
    # A family that holds itself is one definition, and everything pointed to is there.
    assert {ref.removeprefix("#/$defs/") for ref in references(schema)} == set(definitions)
    assert definitions["Score"]["anyOf"] == [
        {"enum": ["cosine", "linear"]},
        {"$ref": "#/$defs/Cosine", "required": ["kind"]},
        {"$ref": "#/$defs/Linear"},
        {"maximum": 64, "minimum": 1, "type": "integer"},
    ]
    assert {"minimum": 1, "type": "integer"} in definitions["Experts"]["anyOf"]
    assert definitions["Moe"]["properties"]["score"]["description"] == "how tokens are scored"
    assert json.dumps(json_schema(Root)) == json.dumps(schema)
    assert "x-moegen" not in json.dumps(schema)
