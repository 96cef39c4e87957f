"""The harness of examples: measures, training, records, plots, files, and two whole examples."""

from __future__ import annotations

import json
import math
from itertools import repeat
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor, nn
from worked_numbers import CASES

from examples import gaussian_processes, svm_mixture
from examples.data.dataset import Part
from examples.harness import (
    About,
    Claim,
    Results,
    Run,
    Schedule,
    Setting,
    command,
    compiled,
    files,
    fit,
    metrics,
    plots,
)
from examples.harness.fit import averaged, shares_over_steps
from examples.harness.results import final_mean, thinned
from moegen.errors import MoegenError

ROOT = Path(__file__).parent.parent
QUIET = Console(quiet=True)

# measures


def test_auc_is_the_chance_that_a_pair_is_in_order() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(12, (80,), generator=draw) / 12  # with ties
    labels = torch.randint(2, (80,), generator=draw)
    pairs = [(a, b) for a in scores[labels == 1] for b in scores[labels == 0]]
    expected = sum(float(a > b) + 0.5 * float(a == b) for a, b in pairs) / len(pairs)
    assert metrics.auc(scores, labels) == pytest.approx(expected)
    assert metrics.auc(labels.float(), labels) == 1
    assert math.isnan(metrics.auc(scores, torch.ones(80)))


def test_other_measures() -> None:
    y = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert metrics.r2(y, y) == 1
    assert metrics.r2(torch.full((4,), 3.0), y) == pytest.approx(0)
    assert metrics.r2(y + 1, y) == pytest.approx(1 - 4 / 14)
    normal = torch.distributions.Normal(torch.zeros(4), 2.0)
    found = metrics.gaussian_nats(torch.zeros(4), torch.full((4,), 4.0), y)
    assert found == pytest.approx(-normal.log_prob(y).mean().item(), abs=1e-6)
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 1.0]])
    assert metrics.accuracy(logits, torch.tensor([1, 0, 0])) == pytest.approx(2 / 3)
    assert metrics.nats(torch.zeros(3, 7), torch.tensor([1, 0, 6])) == pytest.approx(math.log(7))
    assert metrics.spread([1.0, 3.0]) == (2, pytest.approx(math.sqrt(2)))
    assert metrics.spread([5.0]) == (5, 0)


def test_models_are_measured_in_evaluation_mode_which_is_left_again() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 2))
    x = torch.randn(5, 3)
    found = metrics.predicted(model, Part(x, x), lambda out: out, 2)
    assert model.training
    assert not found.requires_grad
    torch.testing.assert_close(found, model[1](x).detach())


# training


def test_a_line_is_learned_and_recorded() -> None:
    model = nn.Linear(3, 1)
    truth = torch.tensor([1.0, -2.0, 0.5])
    x = torch.randn(256, 3, generator=torch.Generator().manual_seed(1))
    part = Part(x, x @ truth)

    def loss(batch: Part) -> tuple[Tensor, Any]:
        return (model(batch.x)[:, 0] - batch.y).square().mean(), None

    def evaluate() -> dict[str, float]:
        with metrics.evaluating(model):
            return {"R2": metrics.r2(model(part.x)[:, 0], part.y)}

    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    schedule = Schedule(300, rate=0.05, evaluations=4)
    run = fit(Run("line"), model, part.batches(32, draw), loss, evaluate, schedule, QUIET)
    assert [step for step, _ in run.held_out] == [0, 100, 200, 300]
    assert run.final["R2"] > 0.99 > run.held_out[0][1]["R2"]
    assert run.loss[-1][1] < 0.01 < run.loss[0][1]
    assert (run.parameters, run.active, run.loads) == (4, 4, [])
    assert run.loss[-1][0] == 300


TINY = {
    "name": "tiny",
    "model": {
        "kind": "decoder",
        "vocab_size": 16,
        "d_model": 16,
        "layers": 2,
        "max_sequence": 16,
        "attention": {"heads": 2},
        "moe": {
            "experts": {"count": 4, "width": 16},
            "router": {"select": 2, "balance_bias": {"rate": 0.01}},
            "losses": {"balance": 0.01},
        },
    },
}


def test_an_emitted_model_is_trained_and_its_experts_are_recorded() -> None:
    made = compiled(TINY, seed=3, sequence=16)
    assert made.total == sum(p.numel() for p in made.model.parameters())
    assert made.active < made.total
    ids = torch.arange(17).remainder(5).expand(8, -1)[:, :16]
    biases = [b for name, b in made.model.named_buffers() if name.endswith("balance_bias")]
    seen: list[float] = []

    def loss(batch: Tensor) -> tuple[Tensor, Any]:
        total, output = made.model.training_loss(batch)
        seen.append((total - output.losses["balance"]).item())
        return total, output

    run = made.run("mixture", 3)
    fit(run, made.model, repeat(ids), loss, dict, Schedule(12), QUIET)
    assert (run.parameters, run.active) == (made.total, made.active)
    assert [loads.layer for loads in run.loads] == [str(n) for n in made.model.routed_layers()]
    for loads in run.loads:
        assert loads.steps == list(range(1, 13))
        assert all(sum(row) == pytest.approx(1) for row in loads.shares)
    assert [value for _, value in run.loss] == pytest.approx(seen, abs=1e-6)
    assert run.loss[-1][1] < run.loss[0][1]
    assert biases
    assert all(bias.abs().max() > 0 for bias in biases)


def test_weights_of_dense_gates_are_recorded_where_an_example_says_them() -> None:
    gate = nn.Linear(2, 3)
    batch = torch.randn(8, 2)

    def loss(batch: Tensor) -> tuple[Tensor, Any]:
        weights = gate(batch).softmax(-1)
        return weights[:, 0].mean(), weights

    run = fit(
        *(Run("gate"), gate, repeat(batch), loss, dict, Schedule(200, 0.05), QUIET),
        shares=lambda weights: {"task 1": weights.mean(0)},
    )
    (loads,) = run.loads
    assert loads.layer == "task 1"
    assert (len(loads.steps), loads.steps[-1]) == (80, 200)
    assert loads.shares[-1][0] < 0.1 < loads.shares[0][0]


def test_evaluations_are_spread_and_the_last_is_after_all_steps() -> None:
    for steps in (1, 3, 10, 37):
        schedule = Schedule(steps, evaluations=5)
        after = [step for step in range(1, steps + 1) if schedule.evaluates_after(step)]
        assert after[-1] == steps
        assert len(after) == min(4, steps)


def test_curves_are_thinned_without_leaving_steps_out() -> None:
    assert thinned(3, 10) == [0, 1, 2]
    assert thinned(101, 3) == [0, 50, 100]
    points = averaged([float(number) for number in range(1000)])
    assert len(points) == 200
    assert points[-1][0] == 1000
    before = [0, *(step for step, _ in points)]
    total = sum(v * (b - a) for (b, v), a in zip(points, before, strict=False))
    assert total == pytest.approx(sum(range(1000)))
    even = shares_over_steps("1", [1, 2], torch.tensor([[3, 1], [0, 0]]))
    assert even.shares == [[0.75, 0.25], [0, 0]]


# results


def some_run(system: str = "mixture [8]", seed: int = 0, last: float = 0.5) -> Run:
    run = Run(system, seed, parameters=10, active=5, flops=2e3, loss=[(1, 2.0), (2, 1.0)])
    run.measure(0, {"AUC": 0.1})
    run.measure(2, {"AUC": 0.2})
    run.measure(2, {"AUC": last, "nats": math.nan})
    run.loads.append(shares_over_steps("1", [1, 2], torch.tensor([[3, 1], [1, 3]])))
    return run


ABOUT = About("made_up", "A made-up example", "Nobody 1900, Nothing")


@command(ABOUT, seeds=2)
def example(setting: Setting) -> Results:
    """Two seeds of one system, and a baseline on two tables."""
    runs = [some_run(seed=seed, last=0.5 + seed / 4) for seed in setting.all_seeds]
    baseline = Run("dense", on="other")
    baseline.measure(2, {"AUC": setting(0.75, 0.25)})
    return Results("no data", [*runs, baseline], [Claim("it is good", "it [is] not", False)])


def ran(example: click.Command, *arguments: str | Path, code: int = 0) -> str:
    found = CliRunner(env={"COLUMNS": "150"}).invoke(example, [str(a) for a in arguments])
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == code, found.output
    return found.output


def test_an_example_prints_tables_and_leaves_a_record(tmp_path: Path) -> None:
    out = ran(example, "--out", tmp_path)
    assert "A made-up example (Nobody 1900, Nothing)" in out
    assert "mixture [8]" in out
    assert "0.6250 ± 0.1768" in out
    assert "it [is] not" in out
    names = {"results.json", "curves.png", "curves-other.png", "loads-mixture-8.png"}
    assert {place.name for place in tmp_path.iterdir()} == names
    assert all(place.stat().st_size > 500 for place in tmp_path.iterdir())
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["about"]["name"] == "made_up"
    assert data["setting"] == {"quick": False, "seed": 0, "seeds": 2}
    assert [run["seed"] for run in data["runs"]] == [0, 1, 0]
    assert data["runs"][0]["held_out"] == [[0, {"AUC": 0.1}], [2, {"AUC": 0.5, "nats": None}]]
    assert data["runs"][0]["loads"][0]["shares"] == [[0.75, 0.25], [0.25, 0.75]]
    assert data["claims"][0]["holds"] is False
    assert " [0.75, 0.25],\n" in (tmp_path / "results.json").read_text()


def test_quick_runs_have_one_seed_and_a_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = ran(example, "--quick", "--seed", 7)
    assert "wrote generated/quick/made_up/results.json" in out
    data = json.loads((tmp_path / "generated/quick/made_up/results.json").read_text())
    assert [run["seed"] for run in data["runs"]] == [7, 0]
    assert data["runs"][-1]["held_out"][-1][1]["AUC"] == 0.25
    assert not (tmp_path / "docs").exists()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ran(example, "--out", tmp_path)
    ran(example, "--out", tmp_path)  # over its own files
    (tmp_path / "curves.png").write_bytes(b"mine")
    said = ran(example, "--out", tmp_path, code=2)
    assert "has curves.png, which no example wrote, or which was edited since" in said
    assert "--force" in said
    assert (tmp_path / "curves.png").read_bytes() == b"mine"
    ran(example, "--out", tmp_path, "--force")
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"
    record = tmp_path / "results.json"
    record.write_text(record.read_text().replace("it is good", "it is very good"))
    assert "results.json" in ran(example, "--out", tmp_path, code=2)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"format": 1}'])
def test_a_foreign_record_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    ran(example, "--out", tmp_path, code=2)
    assert (tmp_path / "results.json").read_text() == text


def test_plots_that_are_not_made_any_more_are_removed(tmp_path: Path) -> None:
    files.leave(ABOUT, {}, Results("", [some_run("old")], []), tmp_path)
    assert (tmp_path / "loads-old.png").exists()
    files.leave(ABOUT, {}, Results("", [some_run("new")], []), tmp_path)
    assert sorted(p.name for p in tmp_path.glob("loads*")) == ["loads-new.png"]


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    @command(ABOUT)
    def broken(setting: Setting) -> Results:
        raise MoegenError("there is no data")

    assert ran(broken, "--out", tmp_path / "a", code=2).endswith("error: there is no data\n")
    (tmp_path / "file").write_text("")
    assert "file" in ran(example, "--out", tmp_path / "file", code=2)
    assert "cannot make the folder" in ran(example, "--out", tmp_path / "file" / "b", code=2)
    assert "0 is not in the range" in ran(example, "--seeds", 0, code=2)


def test_nothing_is_drawn_of_nothing() -> None:
    assert plots.curves([Run("empty")]) is None
    assert plots.heatmap(Run("empty")) is None


def test_curves_show_the_mean_of_seeds_and_lines_for_what_was_measured_once() -> None:
    once = Run("once")
    once.measure(2, {"AUC": 0.9})
    figure = plots.curves([some_run(last=0.4), some_run(seed=1, last=0.8), once])
    assert figure is not None
    loss, auc, _ = figure.axes[:3]
    assert [list(line.get_ydata()) for line in loss.lines] == [[2, 1]]
    assert list(auc.lines[0].get_ydata()) == pytest.approx([0.1, 0.6])
    assert [line.get_linestyle() for line in auc.lines][-1] == "--"
    assert final_mean([some_run(last=0.4), some_run(last=0.8)], "AUC") == pytest.approx(0.6)


def test_heatmaps_show_loads_over_the_mean() -> None:
    figure = plots.heatmap(some_run())
    assert figure is not None
    image = figure.axes[0].images[0].get_array()
    assert image is not None
    assert image.tolist() == [[1.5, 0.5], [0.5, 1.5]]


# examples without networks


def test_rows_go_to_the_machine_that_has_room() -> None:
    case = CASES["svm-mixture-capacity-assignment"]
    outputs = torch.tensor(case["inputs"]["gater_outputs"])
    room = svm_mixture.capacity(*outputs.shape, case["params"]["c"])
    assert room == case["expected"]["capacity"]
    assert svm_mixture.assign(outputs, room).tolist() == case["expected"]["assignment"]
    draw = torch.Generator().manual_seed(0)
    preference = torch.randn(100, 7, generator=draw)
    chosen = svm_mixture.assign(preference, 15)
    assert torch.bincount(chosen).max() <= 15
    free = svm_mixture.assign(preference, 100)
    assert torch.equal(free, preference.argmax(-1))


def test_svm_mixture(tmp_path: Path) -> None:
    with_data(svm_mixture.telescope)
    out = ran(svm_mixture.main, "--quick", "--out", tmp_path)
    assert "8 SVMs with a gater" in out
    data = json.loads((tmp_path / "results.json").read_text())
    gated, uniform, whole, share = data["runs"]
    assert gated["held_out"][-1][1]["accuracy"] > 0.75
    assert whole["held_out"][-1][1]["AUC"] > 0.85
    assert share["parameters"] < whole["parameters"] < uniform["parameters"] < gated["parameters"]
    assert [sum(row) for row in gated["loads"][0]["shares"]] == pytest.approx([1] * 6)
    assert len(data["claims"]) == 4
    again = ran(svm_mixture.main, "--quick", "--out", tmp_path)
    later = json.loads((tmp_path / "results.json").read_text())
    assert [run["held_out"] for run in later["runs"]] == [run["held_out"] for run in data["runs"]]
    assert "wrote" in again


def with_data(load: Any) -> None:
    """Without a network and a cache there is nothing to run on."""
    try:
        load()
    except MoegenError as error:
        pytest.skip(str(error))


def test_a_process_that_leaves_a_row_out_is_one_without_it() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(12, 2))
    y = np.sin(x[:, 0]) + 0.1 * random.normal(size=12)
    expert = gaussian_processes.Expert.of(x, y)
    mean, variance = expert.without_itself(y)
    shift, scale, kernel = expert.shift, expert.scale, expert.process.kernel_
    for row in range(12):
        rest = np.arange(12) != row
        covariance = kernel(x[rest]) + 1e-6 * np.eye(11)
        to_row = kernel(x[row : row + 1], x[rest])[0]
        weights = np.linalg.solve(covariance, to_row)
        own = kernel(x[row : row + 1])[0, 0] + 1e-6
        expected = weights @ ((y[rest] - shift) / scale) * scale + shift
        assert mean[row] == pytest.approx(expected, abs=1e-6)
        assert variance[row] == pytest.approx((own - weights @ to_row) * scale**2, abs=1e-6)


def test_densities_of_a_mixture_sum_to_one() -> None:
    gate, mean, variance = (np.array([row]) for row in ([0.3, 0.7], [-1.0, 2.0], [0.5, 1.5]))
    grid = np.linspace(-12, 12, 20_001)
    step = grid[1] - grid[0]
    many = [values.repeat(len(grid), 0) for values in (gate, mean, variance)]
    density = np.exp(gaussian_processes.log_density(*many, grid))
    middle, spread = gaussian_processes.moments(gate, mean, variance)
    assert density.sum() * step == pytest.approx(1, abs=1e-6)
    assert (density * grid).sum() * step == pytest.approx(middle[0], abs=1e-6)
    assert (density * (grid - middle) ** 2).sum() * step == pytest.approx(spread[0], abs=1e-5)


def test_gaussian_processes(tmp_path: Path) -> None:
    with_data(gaussian_processes.bikes)
    out = ran(gaussian_processes.main, "--quick", "--out", tmp_path)
    assert "bikes: 2 processes" in out
    data = json.loads((tmp_path / "results.json").read_text())
    assert [run["on"] for run in data["runs"]] == ["bikes"] * 3 + ["diabetes"] * 3
    assert all(run["held_out"][-1][1]["nats"] < 2.5 for run in data["runs"])
    assert data["runs"][4]["held_out"][-1][1]["R2"] > 0.2
    assert (tmp_path / "curves-bikes.png").exists()
