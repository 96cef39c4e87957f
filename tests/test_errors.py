"""The report of problems, and names that are safe."""

from __future__ import annotations

import ast
import keyword
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moegen.errors import Mark, MoegenError, PlanError, Problem, SpecError, dotted, render, visible
from moegen.spec.names import identifier, safe_name

WIDE = "\uff43\uff4c\uff41\uff53\uff53"  # "class" to Python's parser
FUZZ = settings(deadline=None)


def test_one_problem_exactly():
    mark = Mark("specs/t.yaml", 4, 3, "  expert:")
    problem = Problem(
        "unknown key 'expert'", mark, ("moe", "expert"), hint="did you mean 'experts'?"
    )
    assert render([problem]) == (
        "specs/t.yaml:4:3: error: unknown key 'expert'; did you mean 'experts'?\n"
        "     4 |   expert:\n"
        "       |   ^ moe.expert"
    )


def test_note_stands_below_the_message():
    problem = Problem("bad sizes", Mark("t.yaml", 5, 1, "a: 1"), ("a",), note="traced at x.py:20")
    assert render([problem]) == (
        "t.yaml:5:1: error: bad sizes\n  traced at x.py:20\n     5 | a: 1\n       | ^ a"
    )


def test_without_a_mark():
    assert render([Problem("no backend is called 'x'")]) == "error: no backend is called 'x'"
    assert render([Problem("bad", path=("a", 0))]) == "error: bad\n  at a.0"


def test_sorted_by_place_and_told_once():
    second = Problem("b", Mark("t.yaml", 2, 1, "b"))
    first = Problem("a", Mark("t.yaml", 1, 5, "a"))
    last = Problem("c")
    report = render([last, second, first, second])
    assert [line[-1] for line in report.splitlines() if "error" in line] == ["a", "b", "c"]


def test_at_most_twenty():
    problems = [Problem(f"p{n}", Mark("t.yaml", n, 1, "x")) for n in range(1, 31)]
    report = render(problems)
    assert report.count("error:") == 20
    assert report.endswith("\n... and 10 more")


def test_long_lines_are_cut_around_the_column():
    text = "x" * 5000 + "HERE" + "y" * 5000
    lines = render([Problem("m", Mark("t.yaml", 1, 5001, text), ("p",))]).splitlines()
    assert len(lines[1]) < 130
    assert lines[1].index("HERE") == lines[2].index("^")
    assert lines[1].endswith("...")
    assert "| ..." in lines[1]


@pytest.mark.parametrize("before", ["\t", "\x1b[31m", "日本", "e\u0301", "\u202e"])
def test_caret_stands_under_the_column(before: str):
    lines = render([Problem("m", Mark("t.yaml", 1, len(before) + 1, f"{before}X"))]).splitlines()
    wide = sum(ch in "日本" for ch in lines[1]) - lines[1].count("\u0301")
    assert lines[1].index("X") + wide == lines[2].index("^")
    assert "\x1b" not in lines[1]
    assert "\u202e" not in lines[1]


@FUZZ
@given(st.text(), st.text(), st.integers(1, 50))
def test_no_text_acts_on_a_terminal(message: str, line: str, column: int):
    report = render([Problem(message, Mark(message, 1, column, line), (line, 3), message, line)])
    assert all(part.isprintable() for part in report.split("\n"))


def test_visible_and_dotted():
    assert visible("a\tb\x00") == "a\\tb\\x00"
    assert dotted(("moe", 3, "a b", "x.y")) == "moe.3.'a b'.'x.y'"
    assert len(dotted(("k" * 10000,))) < 60


def test_errors_hold_their_problems():
    error = SpecError([Problem("a"), Problem("b")])
    assert isinstance(error, MoegenError)
    assert [problem.message for problem in error.problems] == ["a", "b"]
    assert str(error) == "error: a\nerror: b"
    assert PlanError("no").problems == (Problem("no"),)
    assert pickle.loads(pickle.dumps(error)).problems == error.problems


@pytest.mark.parametrize("name", ["tiny", "deepseek-v3", "Qwen3-30B-A3B", "a.b_c", "x" * 64])
def test_good_names(name: str):
    assert safe_name(name) is None


@pytest.mark.parametrize(
    "name",
    [
        *("", "../x", "a..b", "a/b", "a\\b", ".x", "-x", "1a", "x" * 65, "é", WIDE, "a b"),
        *("a\n", "a\0", "con", "NUL.txt", "a.", "C:x"),
    ],
)
def test_bad_names(name: str):
    assert safe_name(name)


def test_identifiers():
    assert identifier("deepseek-v3") == "deepseek_v3"
    assert identifier("8x7b") == "model_8x7b"
    assert identifier("class") == "class_"
    assert identifier(WIDE) == "class_"
    assert identifier("--") == "model"


@FUZZ
@given(st.text())
def test_identifier_is_always_one(name: str):
    word = identifier(name)
    assert word.isascii()
    assert word.isidentifier()
    assert not keyword.iskeyword(word)
    ast.parse(f"{word} = 1")
