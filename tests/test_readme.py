"""What the README shows is what there is: specs load, code runs, commands work."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
from click.testing import CliRunner

import moegen
from moegen.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = ROOT / "specs" / "tiny.yaml"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what else stands behind the fence, and its text."""

    language: str
    note: str
    text: str
    line: int


@cache
def blocks() -> tuple[Block, ...]:
    fence = re.compile(r"^```(\w+) ?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return tuple(
        Block(m[1], m[2], m[3], README.count("\n", 0, m.start()) + 1)
        for m in fence.finditer(README)
    )


def of(language: str, note: str = "") -> list[Block]:
    return [b for b in blocks() if b.language == language and b.note == note]


def ids(found: list[Block]) -> list[str]:
    return [f"line {block.line}" for block in found]


YAML = of("yaml")
COMMANDS = [
    (block.line, line)
    for block in of("console")
    for line in block.text.splitlines()
    if line.startswith("moegen ")
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the specs and the files that the README shows."""
    (tmp_path / "specs").mkdir()
    for name in ("tiny", "deepseek-v3", "mixtral-8x7b"):
        shutil.copy(ROOT / f"specs/{name}.yaml", tmp_path / "specs")
    for block in blocks():
        if block.note.startswith("file="):
            (tmp_path / block.note.removeprefix("file=")).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_test() -> None:
    assert len(YAML) > 12
    assert len(COMMANDS) > 10
    assert {b.note for b in blocks() if b.language == "python"} == {
        "",
        "emitted",
        "file=my_policy.py",
        "file=my_backend.py",
    }


def test_the_first_spec_is_tiny() -> None:
    assert YAML[0].text == TINY.read_text(encoding="utf-8")


@pytest.mark.parametrize("block", YAML[1:], ids=ids(YAML[1:]))
def test_specs_are_planned(block: Block, tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path)
    extended = "" if block.text.startswith("extends") else "extends: tiny.yaml\n"
    (tmp_path / "snippet.yaml").write_text(extended + block.text)
    plan = moegen.plan(tmp_path / "snippet.yaml", batch=1, sequence=32)
    assert plan.root.totals() != moegen.plan(TINY).root.totals() or is_free(block)


def is_free(block: Block) -> bool:
    """Whether a snippet is about what costs no parameters."""
    return any(word in block.text for word in ("capacity:", "losses:", "source:"))


def test_emitted_code_is_what_is_emitted(tmp_path: Path) -> None:
    text = (moegen.build(TINY, tmp_path / "tiny") / "model.py").read_text(encoding="utf-8")
    (block,) = of("python", "emitted")
    assert block.text in text
    moegen.build(TINY, tmp_path / "sigmoid", {"moe.router.affinity": "sigmoid"})
    changed = (tmp_path / "sigmoid/model.py").read_text(encoding="utf-8")
    assert block.text.replace("logits.softmax(-1)", "logits.sigmoid()") in changed


def test_routing_is_told_as_shown(place: Path) -> None:
    """What the page prints is what the command prints, but for spaces at the ends of lines."""
    (block,) = of("text", "show-routing")
    command = ["show", "--routing", "specs/tiny.yaml"]
    result = CliRunner().invoke(cli, command, env={"COLUMNS": "100"})
    assert [line.rstrip() for line in result.stdout.splitlines()] == block.text.splitlines()


@pytest.mark.parametrize(("line", "command"), COMMANDS, ids=[f"line {n}" for n, _ in COMMANDS])
def test_commands(place: Path, line: int, command: str) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "check":
        moegen.build("specs/tiny.yaml")
    if words[0] == "--import":  # registers for good, so in a process of its own
        made = [sys.executable, "-m", "moegen", *words]
        done = subprocess.run(made, cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "F.softplus(logits" in (place / "mine/model.py").read_text()
        return
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output


def test_python_runs(place: Path) -> None:
    """All blocks together, as a reader would paste them, with warnings as errors."""
    script = "\n".join(block.text for block in of("python"))
    (place / "script.py").write_text(script)
    command = [sys.executable, "-W", "error", "script.py"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([4, 24])" in done.stdout
    assert (place / "generated/small/model.py").is_file()


def test_a_backend_that_imports_nothing_of_ours(place: Path) -> None:
    """Installed as a package would be: a folder with metadata on Python's path."""
    moegen.build("specs/tiny.yaml", "out")
    shutil.copy("out/ops.py", "my_ops.py")
    facts = place / "my_backend-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: my-backend\nVersion: 1.0\n")
    (block,) = of("toml")
    heading, line = block.text.splitlines()
    assert heading == '[project.entry-points."moegen.backends"]'
    entry = line.replace('"', "")
    (facts / "entry_points.txt").write_text(f"[moegen.backends]\n{entry}\n")
    script = """
        import moegen
        from moegen.report.listing import print_backends
        from rich.console import Console
        moegen.build("specs/tiny.yaml", "mine", backend="mine")
        assert moegen.check("mine") == []
        moegen.build("specs/tiny.yaml", "doubles", {"precision.parameters": "fp64"})
        print_backends(Console(width=200), "doubles/spec.yaml")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "my ops know no fp64" in done.stdout
    assert (place / "mine/ops.py").read_text() == (place / "my_ops.py").read_text()


def test_every_path_that_is_mentioned_exists() -> None:
    mentioned = re.findall(r"\]\(([\w./-]+)\)", README)
    (tree,) = of("text")
    parents: list[str] = []
    for line in tree.text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        entries = list(takewhile(re.compile(r"[\w./-]*(\.\w+|/)$").match, line.split()))
        assert entries, line
        mentioned += ["".join([*parents[:depth], entry]) for entry in entries]
        parents = [*parents[:depth], entries[0]]
    assert len(mentioned) > 20
    assert [name for name in mentioned if not (ROOT / name).exists()] == []


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:tests|benchmarks)/\w+\.py", README))
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
