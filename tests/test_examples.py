"""Examples run, small: what the README tells newcomers to start with."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import moegen
from examples import corpus, sweep, train_tiny
from examples.training import optimizer, share_of_rate
from moegen.api import import_package
from moegen.observe import Recorder

ROOT = Path(__file__).parent.parent
OPTIONS = ["--steps", "6", "--batch", "2", "--sequence", "32", "--examined", "4", "--minutes", "0"]


@pytest.fixture(scope="module")
def text() -> corpus.Corpus:
    return corpus.standard_library()


def test_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train_tiny, "standard_library", lambda: corpus.standard_library(400_000))
    assert train_tiny.main([*OPTIONS, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2,923,904 parameters, 859,520 of them for a token" in out
    assert "after 'def ' it writes:" in out
    record = json.loads((tmp_path / "demo/losses.json").read_text())
    assert len(record["steps"]) == 6
    assert record["held_out"][0][1] == pytest.approx(math.log(256), abs=0.1)
    assert record["held_out"][-1][1] < record["held_out"][0][1] - 0.5
    assert re.search(r"step 6: loss .*\n.*\nlayer .*unused .*\n.*\n1 ", out)
    assert "<title>Experts of the demo</title>" in (tmp_path / "demo/routing.html").read_text()
    assert (tmp_path / "demo/training.png").stat().st_size > 10_000
    assert moegen.check(tmp_path / "tiny") == []
    again = train_tiny.parsed([*OPTIONS, "--out", str(tmp_path / "again")])
    history = train_tiny.run(again, Console(quiet=True))
    assert [step.loss for step in history.steps] == record["steps"]


def test_demo_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny.main(["--spec", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_demo_stops_when_its_time_is_up(text: corpus.Corpus) -> None:
    options = train_tiny.Options(steps=10**6, minutes=0.02, batch=2, sequence=16)
    model = moegen.module(ROOT / "specs/tiny.yaml").Model()
    history = train_tiny.History(Recorder())
    exam = text.examination(2, 16)
    train_tiny.train(model, text, exam, options, history, Console(quiet=True))
    assert 0 < len(history.steps) < 1000
    assert history.held_out[-1][0] == len(history.steps)


def test_files_are_on_one_side_only(text: corpus.Corpus) -> None:
    names = [Path(f"a/{number}.py") for number in range(2000)]
    held_out = sum(map(corpus.is_held_out, names))
    assert 150 < held_out < 250
    assert 0.03 < len(text.held_out) / (len(text.train) + len(text.held_out)) < 0.2
    assert text.examination(3, 8).shape == (3, 8)
    assert text.unigram_loss(text.examination(64, 64)) == pytest.approx(3.2, abs=0.25)


def test_decay_is_for_matrices_that_multiply() -> None:
    model = moegen.module(ROOT / "specs/tiny.yaml").Model()
    decayed, free = optimizer(model, 1e-3).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared = {names[id(p)].rpartition(".")[2] for p in free["params"]}
    assert spared == {"embedding", "router", "norm", "attention_norm", "ffn_norm"} | {
        "query_norm",
        "key_norm",
    }
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


def test_schedule_warms_up_and_cools_down() -> None:
    shares = [share_of_rate(done / 1000) for done in range(1001)]
    top = shares.index(max(shares))
    assert shares[0] < 0.05
    assert max(shares) == pytest.approx(1, abs=0.01)
    assert shares[: top + 1] == sorted(shares[: top + 1])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert shares[-1] == pytest.approx(0.05)


def python(*command: str | Path, folder: Path = ROOT) -> str:
    """What a process of its own prints: elements that are defined stay registered."""
    made = [sys.executable, *command]
    done = subprocess.run(made, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


POLICY = """
import torch
import moegen
from examples import add_a_policy, confident

add_a_policy.main(["--steps", "30"])
scores = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04]])
experts = torch.tensor([[0, 1], [0, 1]])
assert confident.drop_weak(experts, scores, 0.5, 3).tolist() == [[0, 1], [0, 3]]

# It is top-k where it drops nothing.
ours = moegen.module(add_a_policy.SPEC, {"moe.router.select.share": 0}).Model()
top_k = {"moe.router.select": {"kind": "top_k", "k": 3}}
theirs = moegen.module(add_a_policy.SPEC, top_k).Model()
theirs.load_state_dict(ours.state_dict())
ids = torch.randint(64, (2, 16))
assert torch.equal(ours(ids).logits, theirs(ids).logits)
"""


def test_policy_of_a_user() -> None:
    out = python("-c", POLICY)
    assert "select.share must be a number from 0 to 1, not 1.5" in out
    assert "def drop_weak(experts: Tensor" in out
    assert "230,720 parameters, at most 107,840 a token" in out
    first, last, met = (float(number) for number in re.findall(r"(\d\.\d+) (?:after|experts)", out))
    assert last < first - 2
    assert 1 <= met < 3


def test_policy_of_a_user_from_the_command_line(tmp_path: Path) -> None:
    command = ["-m", "moegen", "--import", "examples/confident.py", "build", "specs/tiny.yaml"]
    change = ["-o", "moe.router.select={kind: confident, k: 3}"]
    python(*command, *change, "--out", tmp_path / "tiny")
    model = import_package(tmp_path / "tiny").Model()
    assert model(torch.zeros(1, 4).long()).logits.shape == (1, 4, 256)


SCRIPT = '''
"""A script with an op of its own, and statements that have no place in a package."""
import torch
from moegen.arch.routing.affinity import Affinity
from moegen.ops.op import op
from typing import ClassVar, Literal
import moegen

print(torch.__version__)
torch.manual_seed(0)
LOW, HIGH = 0.0, 1.0

def {helper}(x):
    return x.clamp(LOW, HIGH)

@op()
def hard_sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """Piecewise linear."""
    return {helper}(logits / 6 + 0.5)

class HardSigmoid(Affinity):
    """Piecewise linear scores."""
    kind: Literal["hard_sigmoid"] = "hard_sigmoid"
    sums_to_one: ClassVar[bool] = False

    def scores(self, b, logits, site):
        return hard_sigmoid(logits)

if __name__ == "__main__":
    torch.set_num_threads(1)
    overrides = {{"moe.router.affinity": "hard_sigmoid"}}
    place = moegen.build({spec!r}, "out", overrides)
    print((place / "ops.py").read_text())
'''


def script(folder: Path, helper: str) -> subprocess.CompletedProcess[str]:
    (folder / "own.py").write_text(SCRIPT.format(helper=helper, spec=str(ROOT / "specs/tiny.yaml")))
    command = [sys.executable, "own.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_op_of_a_script_is_emitted_with_what_it_needs_only(tmp_path: Path) -> None:
    found = script(tmp_path, "_bounded")
    assert found.returncode == 0, found.stderr
    for wanted in ("def _bounded(x)", "LOW, HIGH = 0.0, 1.0", "def hard_sigmoid("):
        assert found.stdout.count(wanted) == 1
    for foreign in ("print(", "manual_seed", "__main__", "set_num_threads", "moegen.build"):
        assert foreign not in found.stdout
    import_package(tmp_path / "out").Model()(torch.zeros(1, 4).long())


def test_two_helpers_of_one_name_are_refused(tmp_path: Path) -> None:
    found = script(tmp_path, "_inverse")  # moegen.ops.experts has one, too
    assert found.returncode == 1
    assert "ops of __main__ and moegen.ops.experts both use a '_inverse'" in found.stderr


def test_sweep_of_granularity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ROOT / "specs/tiny.yaml"
    sweep.main(["--spec", str(spec), "--granularity", "1", "4", "--out", str(tmp_path)])
    assert "10^9.6" in capsys.readouterr().out
    assert (tmp_path / "granularity.png").stat().st_size > 10_000
    coarse, fine = sweep.rows(str(spec), (1, 4))
    assert (coarse.experts, coarse.chosen, fine.experts, fine.chosen) == (16, 2, 64, 8)
    assert fine.total - fine.router == coarse.total - coarse.router
    assert fine.router == 4 * coarse.router
