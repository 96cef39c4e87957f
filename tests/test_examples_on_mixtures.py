"""Examples of mixtures that are whole models, and of several tasks: measures and quick runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from examples import chen, hme, hme_report, mmoe
from examples.data.dataset import Dataset, Part
from examples.data.synthetic import clustered_patches
from examples.harness import Run, Setting, compiled
from examples.harness.results import final_mean
from moegen.errors import MoegenError


def quick(example: click.Command, folder: Path) -> dict[str, Any]:
    """What a quick run of an example leaves; skipped where its data cannot be had."""
    found = CliRunner(env={"COLUMNS": "150"}).invoke(example, ["--quick", "--out", str(folder)])
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    data: dict[str, Any] = json.loads((folder / "results.json").read_text())
    claims = [claim["holds"] for claim in data["claims"]]
    assert all(holds in (True, False) for holds in claims)
    return data


def with_data(load: Any) -> None:
    """Without a network and a cache there is nothing to run on."""
    try:
        load()
    except MoegenError as error:
        pytest.skip(str(error))


def systems(data: dict[str, Any], on: str) -> list[str]:
    return [run["system"] for run in data["runs"] if run["on"] == on]


# chen


def mixture_on_patches() -> tuple[Any, Any]:
    """A mixture of cubic experts whose router is not zero, and rows."""
    model = compiled(chen.SPECS / "chen2022-cubic.yaml", batch=8).model
    _, rows = clustered_patches(60, seed=3)
    router = next(p for name, p in model.named_parameters() if name.endswith("router"))
    torch.nn.init.normal_(router, generator=torch.Generator().manual_seed(1))
    return model, rows


def test_tables_count_the_rows_of_clusters_by_expert() -> None:
    model, rows = mixture_on_patches()
    router = next(p for name, p in model.named_parameters() if name.endswith("router"))
    expected = [[0] * 4 for _ in range(8)]
    for x, cluster in zip(rows.x, rows.cluster.tolist(), strict=True):
        expected[int((router @ x.sum(0)).argmax())][cluster] += 1
    assert chen.dispatched(model, rows).tolist() == expected


def test_every_expert_moves_equally_far() -> None:
    model, rows = mixture_on_patches()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    descent = chen.NormalisedDescent(model, 0.25)
    model.train()
    output_loss, output = model.training_loss(rows.x, rows.y)
    output_loss.backward()
    router_slope = next(p.grad for n, p in model.named_parameters() if n.endswith("router"))
    expected = before["layers.0.router"] - 100 * 0.25 * router_slope
    descent.step()
    moved = (model.layers[0].up - before["layers.0.up"]).flatten(1).norm(dim=1)
    chosen = output.routing[0].load > 0
    assert moved[chosen].tolist() == pytest.approx([0.25] * int(chosen.sum()), rel=1e-4)
    assert moved[~chosen].tolist() == [0] * int((~chosen).sum())
    torch.testing.assert_close(model.layers[0].router.detach(), expected)


def test_chen(tmp_path: Path) -> None:
    data = quick(chen.main, tmp_path)
    assert systems(data, "noise 1/√d") == [*chen.SYSTEMS, chen.WIDE]
    cubic, linear, *singles, wide = data["runs"]
    for single in singles:  # what a row costs
        assert cubic["active"] < single["active"] < 1.1 * cubic["active"]
    assert wide["active"] > cubic["parameters"]
    _, held_out = clustered_patches(240)
    shares = torch.bincount(held_out.cluster).double() / 240
    start = -float((shares * shares.log()).sum())  # all to one expert: the router starts at zero
    for mixture in (cubic, linear):
        assert mixture["held_out"][0][1]["dispatch entropy"] == pytest.approx(start, abs=1e-5)
    assert (tmp_path / "dispatch-1.png").exists()
    assert (tmp_path / "specialise.png").exists()


# hme


def test_passes_are_counted_to_where_the_mean_of_seeds_is() -> None:
    runs = [Run("em", seed) for seed in (0, 1)]
    for run, values in zip(runs, ([3.0, 2.0, 1.0], [3.0, 1.0, 0.6]), strict=True):
        for number, value in enumerate(values):
            run.measure(2 * number, {"training nats": value})
    assert hme_report.passes_to(runs, 1.5) == 2
    assert hme_report.passes_to(runs, 0.8) == 4
    assert hme_report.passes_to(runs, 0.7) is None


def table(rows: int) -> Dataset:
    """A plane with noise."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2 * rows, 5, generator=draw)
    y = x @ torch.tensor([1.0, -0.5, 0.0, 0.3, 0.2]) + 0.4
    y = y + 0.5 * torch.randn(2 * rows, generator=draw)
    return Dataset("plane", Part(x[:rows], y[:rows]), Part(x[rows:], y[rows:]), "")


def test_one_linear_expert_is_least_squares_after_a_pass() -> None:
    data = table(200)
    one = hme.made(hme.TREE, data, 0, hme.ONE)
    run = hme.by_em(Setting(), one.run(hme_report.LINEAR), one.model, data, 1)
    with_one = [
        torch.cat([p.x, torch.ones(200, 1)], 1).double() for p in (data.train, data.held_out)
    ]
    solved = torch.linalg.lstsq(with_one[0], data.train.y.double().unsqueeze(-1)).solution[:, 0]
    left, missed = (
        w @ solved - p.y for w, p in zip(with_one, (data.train, data.held_out), strict=True)
    )
    variance = left.square().mean()
    nats = (missed.square() / variance + torch.log(2 * math.pi * variance)).mean() / 2
    assert run.final["nats"] == pytest.approx(float(nats), abs=1e-5)
    explained = 1 - missed.square().mean() / data.held_out.y.double().var(correction=0)
    assert run.final["R2"] == pytest.approx(float(explained), abs=1e-5)


def test_hme(tmp_path: Path) -> None:
    with_data(hme.bikes)
    data = quick(hme.main, tmp_path)
    assert systems(data, hme.TREES) == [
        hme_report.EM,
        *hme.GRADIENTS,
        hme_report.NETWORK,
        hme_report.LINEAR,
    ]
    assert systems(data, hme.LOSSES) == list(hme_report.OBJECTIVES)
    em, *descents, network, linear = data["runs"][:6]
    assert all(run["parameters"] == em["parameters"] for run in (*descents, network))
    assert linear["parameters"] < em["parameters"]
    for run in data["runs"]:
        passes = [number for number, _ in run["held_out"]]
        assert passes == list(range(len(passes)))
        assert [number for number, _ in run["loss"]] == passes[1:]
    likelihoods = [-loss for _, loss in em["loss"]]
    assert likelihoods == sorted(likelihoods)
    assert (tmp_path / "likelihood.png").exists()
    assert (tmp_path / "leaves.png").exists()


# mmoe


def test_gates_are_apart_by_the_weight_that_is_elsewhere() -> None:
    model = compiled(mmoe.SPECS / "mmoe.yaml", batch=8).model
    x = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    tasks = ("first", "second")
    gates = [torch.softmax(x @ getattr(model, f"gate_{t}").router.detach().T, -1) for t in tasks]
    more = (gates[0] - gates[1]).clamp(min=0).sum(-1)  # what the second one lacks
    assert mmoe.distance(model, x, tasks) == pytest.approx(float(more.mean()), abs=1e-6)
    model.gate_second.load_state_dict(model.gate_first.state_dict())
    assert mmoe.distance(model, x, tasks) == 0


def test_mmoe(tmp_path: Path) -> None:
    with_data(mmoe.adult)
    data = quick(mmoe.main, tmp_path)
    assert systems(data, mmoe.PEOPLE) == [*mmoe.CENSUS, mmoe.APART]
    people = [run for run in data["runs"] if run["on"] == mmoe.PEOPLE]
    counts = [run["active"] for run in people]
    assert max(counts) < 1.07 * min(counts)
    for run in people:
        assert set(run["held_out"][-1][1]) == {"AUC, income", "AUC, single"}
    assert [len(run["loads"]) for run in people] == [2, 1, 0, 0]
    made = [Run(**run) for run in data["runs"] if run["on"] == "correlation 0"]
    assert [run.system for run in made] == list(mmoe.MADE)
    assert 0.5 < final_mean(made, "loss") < 6  # two tasks of variance 1, hardly trained
    assert (tmp_path / "gates.png").exists()
    assert (tmp_path / "correlation.png").exists()
