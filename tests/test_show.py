"""What `moegen show` prints and draws of a plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import moegen
from moegen.cli import cli
from moegen.draw import Arrow, Box, Picture, dot, mermaid
from moegen.planner import Plan
from moegen.report.lookup import find

TINY = str(Path(__file__).parent.parent / "specs" / "tiny.yaml")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return moegen.plan(TINY)


def show(*arguments: str, width: int = 80) -> str:
    command = ["show", TINY, *arguments]
    result = CliRunner().invoke(cli, command, env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    return result.stdout


def rows(text: str) -> list[list[str]]:
    return [re.split(r"  +", line.strip()) for line in text.splitlines()]


def test_the_overview_has_every_class_with_its_place_and_size(plan: Plan) -> None:
    found = {row[0]: row[1:] for row in rows(show()) if len(row) == 6}
    assert found["MoE"] == ["model.moe", "12", "1-3", "3", "837,632"]
    assert found["Model"] == ["model", "4", "-", "1", "2,923,904"]
    assert set(found) == {c.class_name for c in plan.components} | {"class"}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["", "Model", "moe", "attention"])
def test_tables_keep_to_the_width(width: int, name: str) -> None:
    text = show(*filter(None, [name]), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_a_component_has_its_lines_and_its_graph() -> None:
    text = show("moe")
    assert "   12 |   moe:\n" in text
    assert "   20 |     losses:" in text
    assert "   21 |" not in text
    line = next(row for row in rows(text) if row[0] == "logits")
    assert line == ["logits", "linear", "[256,16]", "fp32", "1.049 M", "131.1 kB", "16"]
    names = [row[0] for row in rows(text)]
    assert "router" in names
    assert "shared" in names


def test_wide_screens_show_expressions() -> None:
    assert "F.linear(tokens, self.router)" in show("MoE", width=140)


def test_sections_without_a_class_are_found_in_the_class_around_them(plan: Plan) -> None:
    text = show("moe.router.select")
    assert "model.moe.router.select is traced inside MoE" in text
    names = {row[0] for row in rows(text)}
    assert "experts" in names
    assert "rows" not in names
    assert find(plan, "model.moe").components == find(plan, "moe").components
    assert find(plan, "model").components == (plan.root,)


def test_every_program_of_every_class_can_be_shown(plan: Plan) -> None:
    for component in plan.components:
        for program in component.programs:
            assert f"{component.class_name}.{program}," in show(
                component.class_name, "--program", program
            )


def test_mermaid_of_the_model() -> None:
    text = show("--format", "mermaid")
    assert text.startswith("flowchart TD\n")
    assert 's2[["DenseBlock<br/>layer 0<br/>196.9 K parameters"]]' in text
    assert 's3[["MoEBlock x 3<br/>layers 1-3<br/>887.1 K parameters"]]' in text
    assert 's3 -.->|"moe"| c0' in text
    assert text.count("subgraph ") == text.count("    end") + text.count("\n  end")


def test_a_repeated_pattern_is_a_frame() -> None:
    text = show("--format", "mermaid", "-o", "moe.placement={every: 2, offset: 1}")
    assert '["2 times"]' in text
    assert text.count("MoEBlock<br/>") == 1


@pytest.mark.parametrize("program", ["forward", "step", "new_cache", "loss", "update_balance"])
def test_pictures_have_an_arrow_for_each_use(plan: Plan, program: str) -> None:
    text = show("Model", "--program", program, "--format", "mermaid")
    boxes = set(re.findall(r"^  (n\d+)[\[(]", text, re.M))
    ends = re.findall(r"^  (n\d+) -->(?:\|.*\|)? (n\d+)$", text, re.M)
    assert ends
    assert {name for pair in ends for name in pair} <= boxes
    assert len(ends) == text.count("-->")
    drawn = show("Model", "--program", program, "--format", "dot")
    assert drawn.count(" -> ") == len(ends)


def test_labels_cannot_break_a_picture() -> None:
    nasty = 'a "b" <i> `c` #1; | \\N \n end'
    picture = Picture(nasty, [Box("a", (nasty, "2")), Box("b", ("x",))], [Arrow("a", "b", nasty)])
    text = mermaid(picture)
    assert len(text.splitlines()) == 5
    assert text.splitlines()[2] == (
        '  a["a #34;b#34; #60;i#62; #96;c#96; #35;1; #124; \\N end<br/>2"]'
    )
    graph = dot(picture)
    assert '\\"b\\"' in graph
    assert "\\\\N" in graph
    assert len(graph.splitlines()) == 7


def test_inherited_and_overridden_sections_name_their_file(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"extends: {TINY}\nname: more\nmodel: {{ffn: {{width: 256}}}}\n")
    runner = CliRunner()
    text = runner.invoke(cli, ["show", str(spec), "-o", "moe.shared={count: 2}"]).stdout
    found = {row[0]: row for row in rows(text) if len(row) == 6}
    assert found["FeedForward"][2] == "3"
    assert found["Attention"][2] == "tiny.yaml:10"
    assert found["SharedExperts"][2] == "-o:1"
    detail = runner.invoke(
        cli, ["show", str(spec), "moe.shared", "-o", "moe.shared={count: 2}"]
    ).stdout
    assert "    1 | moe.shared={count: 2}" in detail
