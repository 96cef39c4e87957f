"""Elements from a user's file and from installed packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from click.testing import CliRunner

from moegen import MoegenError, plugins
from moegen.cli import cli

ROOT = Path(__file__).parent.parent
TINY = ROOT / "specs" / "tiny.yaml"

AFFINITY = '''"""An affinity of my own."""

from typing import ClassVar, Literal

import torch.nn.functional as F

from moegen.arch.routing.affinity import Affinity


class Softplus(Affinity):
    """Each expert is judged alone, without a bound."""

    kind: Literal["softplus"] = "softplus"
    sums_to_one: ClassVar[bool] = False

    def scores(self, b, logits, site):
        """log(1 + exp(logit))."""
        return F.softplus(logits)
'''


@pytest.fixture
def forgetful() -> Iterator[None]:
    plugins.load_installed.cache_clear()
    yield
    plugins.load_installed.cache_clear()


def test_a_policy_in_a_users_file_is_compiled(tmp_path: Path) -> None:
    policy, out = tmp_path / "policy.py", tmp_path / "model"
    policy.write_text(AFFINITY)
    choice = ["-o", "moe.router.affinity=softplus"]
    unknown = CliRunner().invoke(cli, ["build", str(TINY), *choice, "--out", str(out)])
    assert unknown.exit_code == 2
    assert "softplus" in unknown.stderr
    option = ["--import", str(policy)]
    commands = [
        [*option, "build", str(TINY), *choice, "--out", str(out)],
        [*option, "check", str(out)],
    ]
    # In a process of its own: what registers itself stays.
    code = f"from moegen.cli import cli\nfor c in {commands!r}: cli(c, standalone_mode=False)"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "is what its spec.yaml gives" in made.stdout
    assert "scores = F.softplus(logits)" in (out / "model.py").read_text()


def test_a_file_is_imported_once(tmp_path: Path) -> None:
    place = tmp_path / "twice.py"
    place.write_text("CALLS = []\n")
    first = plugins.load_file(place)
    assert plugins.load_file(str(place)) is first


def test_a_file_may_be_imported_by_python_too(tmp_path: Path) -> None:
    (tmp_path / "my_policy.py").write_text(AFFINITY)
    (tmp_path / "other.py").write_text(AFFINITY)
    code = (
        "from moegen.plugins import load_file\n"
        "from my_policy import Softplus\n"
        "import moegen\n"
        "load_file('my_policy.py')\n"
        f"spec = moegen.load({str(TINY)!r}, {{'moe.router.affinity': 'softplus'}}).spec\n"
        "print(spec.model.moe.router.affinity.kind)\n"
        "load_file('other.py')"
    )
    run = [sys.executable, "-c", code]
    made = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.stdout == "softplus\n", made.stderr
    assert "affinity 'softplus' is defined twice: in moegen_import_" in made.stderr
    assert "and moegen_import_" in made.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nraise ValueError('no luck')\n", "line 2: ValueError: no luck"),
        ("x = (\n", "SyntaxError"),
        ("import nowhere_to_be_found\n", "line 1: ModuleNotFoundError"),
    ],
)
def test_a_broken_file_is_explained(tmp_path: Path, text: str, said: str) -> None:
    place = tmp_path / "broken.py"
    place.write_text(text)
    with pytest.raises(MoegenError) as caught:
        plugins.load_file(place)
    assert said in str(caught.value)
    assert not [name for name in sys.modules if name.endswith("_broken")]


def test_a_file_that_is_not_python(tmp_path: Path) -> None:
    with pytest.raises(MoegenError, match="there is no file"):
        plugins.load_file(tmp_path / "nowhere.py")
    other = tmp_path / "spec.yaml"
    other.write_text("name: x\n")
    with pytest.raises(MoegenError, match="not a Python file"):
        plugins.load_file(other)


@pytest.mark.usefixtures("forgetful")
def test_installed_elements_are_imported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_elements.py").write_text("import sys\nsys.my_elements_count = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("mine", "my_elements", plugins.GROUP)
    asked: list[str] = []

    def points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [point]

    monkeypatch.setattr(plugins, "entry_points", points)
    import moegen

    moegen.load(TINY)
    moegen.load(TINY)
    assert asked == ["moegen.elements"]
    assert "my_elements" in sys.modules
    sys.modules.pop("my_elements")


@pytest.mark.usefixtures("forgetful")
def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", "nowhere_to_be_found", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    with pytest.raises(MoegenError, match="cannot import the elements 'theirs'"):
        plugins.load_installed()
