"""Texts and files to data and places: YAML, duplicate keys, extends, overrides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moegen.errors import SpecError
from moegen.spec.source import Source, locate, read, read_text, sweep

FUZZ = settings(deadline=None)


def refusal(text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(SpecError) as caught:
        read_text(text, "t.yaml", overrides)
    return str(caught.value)


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(texts))}.yaml"


def files_refusal(folder: Path, **texts: str) -> str:
    with pytest.raises(SpecError) as caught:
        read(write(folder, **texts))
    return str(caught.value).replace(f"{folder}/", "")


def value(text: str) -> object:
    return read_text(f"a: {text}").data["a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4", 1e-4),
        ("1.0e6", 1.0e6),
        ("5E-3", 5e-3),
        (".5", 0.5),
        ("-2.", -2.0),
        ("0", 0),
        ("-7", -7),
        ("+7", 7),
        ("1000000000000000", 10**15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars(text: str, expected: object):
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "text",
    [
        *("017", "12:30:45", "yes", "no", "on", "off", "1_000", "2024-01-01", "0x10", "0o7"),
        *("1,0", "e5", "1e", "--1", "inf", "nan", "2024-01-01T00:00:00Z", "=", "671B"),
    ],
)
def test_what_stays_text(text: str):
    assert value(text) == text


@pytest.mark.parametrize("text", ["'1'", '"true"', "'null'", "'1e5'", "''"])
def test_quoted_is_text(text: str):
    assert value(text) == text[1:-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1000000000000001", "too large"),
        ("9" * 5000, "too large"),
        ("1e999", "too large"),
        ("1e-999", "too small"),
        ("1." + "0" * 100, "at most 64 characters"),
        (".inf", "not a finite number"),
        ("-.Inf", "not a finite number"),
        (".nan", "not a finite number"),
    ],
)
def test_refused_numbers(text: str, said: str):
    report = refusal(f"b: 1\na: {text}")
    assert report.startswith("t.yaml:2:4: error: ")
    assert said in report


def test_marks_point_to_keys_and_items():
    source = read_text("a:\n  b: [1, {c: 2}]\n", "t.yaml")
    places = {path: (mark.line, mark.column) for path, mark in source.marks.items()}
    assert places == {
        (): (1, 1),
        ("a",): (1, 1),
        ("a", "b"): (2, 3),
        ("a", "b", 0): (2, 7),
        ("a", "b", 1): (2, 10),
        ("a", "b", 1, "c"): (2, 11),
    }
    assert source.marks["a", "b"].text == "  b: [1, {c: 2}]"
    assert locate(source.marks, ("a", "x", "y")) == source.marks["a",]


def test_duplicate_key_names_both_lines():
    assert refusal("a:\n  b: 1\n  c: 2\n  b: 3\n") == (
        "t.yaml:4:3: error: key 'b' is given twice, first at line 2\n"
        "     4 |   b: 3\n"
        "       |   ^ a.b"
    )


def test_all_problems_at_once():
    report = refusal("a: &x 1\nb: *x\nc: !!str d\n<<: {}\n1: 2\n[q]: 3\na: 4\ne: .nan\n")
    assert report.count("error:") == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "t.yaml:1:1: error: the spec is empty"),
        ("# nothing\n", "the spec is empty"),
        ("- 1", "a spec is a mapping of keys to values, not a list"),
        ("name:x", "write a space after each ':'"),
        ("a: 1\n---\nb: 2", "t.yaml:2:1: error: a second document"),
        ("a: b: c", "t.yaml:1:5: error: a ':' is not possible here"),
        ("a:\n\tb: 1", "t.yaml:2:1: error: a tab cannot stand here; indent with spaces"),
        ("a: {b: 1", "t.yaml:1:4: error: this '{' is not closed"),
        ("a: 'b", "t.yaml:1:4: error: this quote is not closed"),
        ("a:\n  b: 1\n c: 2", "t.yaml:3:2: error: the indentation does not fit"),
        ("a: @b", "put the value in quotes"),
        ("60: 1", 'a key is text, not 60; write "60"'),
        ("true: 1", "a key is text, not true"),
        ("~: 1", "a key is text, not null"),
        ("? {a: 1}\n: 2", "a key is text, not a section or a list"),
        ("extends: b.yaml", "extends needs a spec that is a file"),
    ],
)
def test_refused_texts(text: str, said: str):
    assert said in refusal(text)


def test_byte_order_mark_and_line_ends(tmp_path: Path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    source = read(tmp_path / "a.yaml")
    assert source.data == {"a": 1, "b": 2}
    assert (source.marks["b",].line, source.marks["b",].text) == (2, "b: 2")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"a: 1\nb: caf\xe9\n", "a.yaml:2:7: error: byte 0xe9 is not UTF-8"),
        (b"\xff\xfea\0", "a.yaml:1:1: error: this is UTF-16"),
        (b"a: 1\0", "a.yaml:1:5: error: the character U+0000 (NUL)"),
    ],
)
def test_refused_bytes(tmp_path: Path, raw: bytes, said: str):
    (tmp_path / "a.yaml").write_bytes(raw)
    with pytest.raises(SpecError) as caught:
        read(tmp_path / "a.yaml")
    assert said in str(caught.value)


def test_extends_merges_deeply_and_keeps_places(tmp_path: Path):
    source = read(
        write(
            tmp_path,
            child="extends: base.yaml\nmoe: {experts: 8}\nlist: [3]\n",
            base="name: b\nmoe: {experts: 4, k: 2}\nlist: [1, 2]\n",
        )
    )
    assert source.data == {"name": "b", "moe": {"experts": 8, "k": 2}, "list": [3]}
    assert list(source.data) == ["name", "moe", "list"]
    files = {path: Path(mark.file).name for path, mark in source.marks.items()}
    assert files["moe", "k"] == files["name",] == "base.yaml"
    assert files["moe", "experts"] == files["list", 0] == "child.yaml"
    assert ("list", 1) not in files
    assert [Path(name).name for name in source.files] == ["child.yaml", "base.yaml"]


def test_extends_another_kind_replaces_the_section(tmp_path: Path):
    source = read(
        write(
            tmp_path,
            child="extends: base.yaml\na: {kind: y}\nb: {kind: x}\n",
            base="a: {kind: x, k: 1}\nb: {kind: x, k: 1}\n",
        )
    )
    assert source.data == {"a": {"kind": "y"}, "b": {"kind": "x", "k": 1}}
    assert ("a", "k") not in source.marks


def test_extends_several_later_ones_win(tmp_path: Path):
    source = read(
        write(
            tmp_path,
            child="extends: [one.yaml, two.yaml]\n",
            one="extends: root.yaml\nx: 1\ny: 1\n",
            two="extends: root.yaml\ny: 2\n",
            root="x: 0\nz: 0\n",
        )
    )
    assert source.data == {"x": 0, "y": 2, "z": 0}


def test_extends_is_relative_to_the_file(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, base="a: 1\n")
    child = write(tmp_path / "sub", child="extends: ../base.yaml\n")
    assert read(child).data == {"a": 1}


def test_extends_cycle_is_named(tmp_path: Path):
    report = files_refusal(
        tmp_path, a="x: 1\nextends: b.yaml\n", b="extends: c.yaml\n", c="extends: a.yaml\n"
    )
    assert "extends goes in a circle: a.yaml -> b.yaml -> c.yaml -> a.yaml" in report
    assert report.startswith("a.yaml:2:1: error")
    assert "a.yaml -> a.yaml" in files_refusal(tmp_path, a="extends: a.yaml\n")


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ("bse.yaml", "a.yaml:1:1: error: no file 'bse.yaml'; did you mean 'base.yaml'?"),
        ("base.txt", "extends names .yaml files, not 'base.txt'"),
        ("/etc/passwd", "extends names .yaml files"),
        ("5", "extends names a file or a list of files, not 5"),
        ("{a: b}", "not a section"),
        ("[base.yaml, base.yaml]", "'base.yaml' is extended twice"),
        ("folder.yaml", "is not a file"),
    ],
)
def test_refused_extends(tmp_path: Path, extends: str, said: str):
    (tmp_path / "folder.yaml").mkdir()
    assert said in files_refusal(tmp_path, a=f"extends: {extends}\n", base="b: 1\n")


def test_extends_only_so_deep(tmp_path: Path):
    chain = {f"f{n}": f"extends: f{n + 1}.yaml\n" for n in range(20)}
    assert "more than 16 files deep" in files_refusal(tmp_path, **chain, f20="a: 1\n")


def test_missing_file_and_folder(tmp_path: Path):
    for path in (tmp_path / "x.yaml", tmp_path):
        with pytest.raises(SpecError):
            read(path)


TEXT = "name: x\nmodel:\n  moe: {experts: 8, list: [1, {a: 2}]}\n"


def overridden(*overrides: str) -> Source:
    return read_text(TEXT, "t.yaml", overrides)


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("name=y", ("name",), "y"),
        ("moe.experts=64", ("model", "moe", "experts"), 64),
        ("model.moe.experts=64", ("model", "moe", "experts"), 64),
        ("moe.experts={count: 4}", ("model", "moe", "experts", "count"), 4),
        ("moe.eps=1e-5", ("model", "moe", "eps"), 1e-5),
        ("moe.list.1.a=3", ("model", "moe", "list", 1, "a"), 3),
        ("moe.router.select.k=2", ("model", "moe", "router", "select", "k"), 2),
        ("moe.experts=null", ("model", "moe", "experts"), None),
        ("train.x=a=b", ("train", "x"), "a=b"),
    ],
)
def test_overrides(override: str, path: tuple[str | int, ...], expected: object):
    source = overridden(override)
    found: object = source.data
    for key in path:
        found = found[key]  # type: ignore[index]
    assert found == expected
    mark = source.marks[path]
    assert (mark.file, mark.line, mark.column, mark.text) == ("-o", 1, 1, override)


def test_later_overrides_win_and_old_places_go():
    source = overridden("moe.list=[5]", "moe.experts=1", "moe.experts=2")
    assert source.data["model"]["moe"] == {"experts": 2, "list": [5]}
    assert ("model", "moe", "list", 1) not in source.marks


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("moe.experts.width=5", "model.moe.experts is 8, a single value with no keys below it"),
        ("moe.experts.width=5", "-o 'model.moe.experts={width: ..., ...}'"),
        ("moe.list.7=1", "model.moe.list is a list of 2 items, counted from 0, not '7'"),
        ("moe.list.x=1", "not 'x'"),
        ("x", "'x' has no '='"),
        ("=1", "'' is not a path of keys"),
        ("a..b=1", "is not a path of keys"),
        ("a=", "write null for no value"),
        ("a=[1", "-o:1:3: error: this '[' is not closed"),
        ("a=&x 1", "anchors (&x)"),
        ("a=!!python/name:os.system x", "tags"),
        ("a=1\nb: 2", "an override is one line"),
        ("extends=b.yaml", "extends belongs in a file"),
        ("a=" + "[" * 20000, "at most 10000 characters"),
        ("a=" + "[" * 5000, "nested deeper than 64 levels"),
    ],
)
def test_refused_overrides(override: str, said: str):
    assert said in refusal(TEXT, (override,))


def test_all_bad_overrides_at_once():
    assert refusal(TEXT, ("x", "y", "name=ok")).count("error:") == 2


def test_sweep():
    assert sweep(["a=1,2", "b=x", "c=[1,2],'p,q',{r: s, t: u}"]) == [
        [f"a={a}", "b=x", f"c={c}"] for a in (1, 2) for c in ("[1,2]", "'p,q'", "{r: s, t: u}")
    ]
    assert sweep([]) == [[]]
    with pytest.raises(SpecError, match="more than 10000 combinations"):
        sweep([f"{name}={','.join('0123456789')}" for name in "abcde"])


def attempt(function: Callable[[], object]) -> object:
    """What is read, or the report; any other exception fails the test."""
    try:
        return function()
    except SpecError as error:
        return str(error)


@FUZZ
@given(st.text())
def test_any_text_is_read_or_refused(text: str):
    assert attempt(lambda: read_text(text))


@FUZZ
@given(st.text(alphabet="ab:-?[]{},&*!|>'\"%@`#\\ \t\n\r01.e~<=\ufeff\x85"))
def test_any_syntax_is_read_or_refused(text: str):
    for whole in (text, f"a: {text}", f"a:\n  - {text}"):
        assert attempt(lambda whole=whole: read_text(whole))  # type: ignore[misc]


@FUZZ
@given(st.binary())
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(raw)
    assert attempt(lambda: read(file))


@FUZZ
@given(st.lists(st.text(alphabet="amoe.=1,[]{}'\n -x")))
def test_any_override_is_read_or_refused(overrides: list[str]):
    assert attempt(lambda: [overridden(*combination) for combination in sweep(overrides)])
