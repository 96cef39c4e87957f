"""Examples on images, spans and captions: what they measure, and each of them in short."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

import moegen
from examples import gmoe, limoe, soft_moe, switch_spans, v_moe
from examples.classifiers import neighbours, refused, same_weights, spec, unseen, verdict
from examples.data.dataset import Part
from examples.harness import Run
from moegen.errors import MoegenError


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(name: str, **overrides: Any) -> Any:
    torch.manual_seed(0)
    return moegen.module(moegen.plan(spec(name), overrides)).Model()


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


# What is measured


def test_what_has_no_room_is_what_was_refused() -> None:
    model = model_of("vmoe-digits")
    tight = v_moe.with_room(model, spec("vmoe-digits"), 0.25, "vanilla")
    ample = v_moe.with_room(model, spec("vmoe-digits"), 8.0, "vanilla")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), tight.parameters(), strict=True)
    )
    batch = images(6)
    out = refused(tight, batch)
    assert out.shape == (2, 6, 17)
    dropped = torch.stack([one.dropped for one in tight(batch).routing])
    torch.testing.assert_close(out.double().mean((1, 2)).float(), dropped)
    assert dropped.min() > 0.5  # a quarter of the places
    assert not refused(ample, batch).any()


def test_orders_differ_only_where_room_is_short() -> None:
    model, source = model_of("vmoe-digits"), spec("vmoe-digits")
    logits = {
        (ratio, order): v_moe.with_room(model, source, ratio, order)(images(6)).logits
        for ratio in (0.25, 8.0)
        for order in v_moe.ORDERS
    }
    assert torch.equal(logits[8.0, "BPR"], logits[8.0, "vanilla"])
    assert not torch.allclose(logits[0.25, "BPR"], logits[0.25, "vanilla"], atol=1e-4)


def test_tokens_that_no_expert_sees() -> None:
    choice, soft = model_of("tokens-choice-digits"), model_of("softmoe-digits")
    batch = images(6)
    assert unseen(choice, batch) == pytest.approx(refused(choice, batch).double().mean().item())
    assert unseen(choice, batch) > 0
    assert unseen(soft, batch) == 0
    assert neighbours(soft, batch) < 1e-5
    assert neighbours(choice, batch) > 1e-4


def test_patches_without_ink() -> None:
    batch = torch.zeros(1, 1, 8, 8)
    batch[0, 0, 3, 6] = 0.5  # row 1 of patches, column 3
    assert (~v_moe.blank(batch)).nonzero().tolist() == [[0, 7]]


def test_the_same_slots_among_other_experts() -> None:
    one = moegen.plan(spec("softmoe-digits"), soft_moe.divided(4)).spec.model.moe
    assert (one.num_experts, one.router.select.slots) == (4, 4)
    assert soft_moe.division(4) == "Soft MoE, 4 x 4"


def test_images_are_turned() -> None:
    batch = torch.rand(2, 1, 8, 8)
    turned = gmoe.turned(batch, torch.tensor([0.0, 90.0]))
    torch.testing.assert_close(turned[0], batch[0])
    torch.testing.assert_close(turned[1], torch.rot90(batch[1], 1, (1, 2)), atol=1e-5, rtol=0)
    there = gmoe.all_at(Part(batch, torch.arange(2)), 90)
    torch.testing.assert_close(there.x[1], turned[1])


def test_scenes_are_two_by_two() -> None:
    cells = torch.arange(4.0).repeat_interleave(8).expand(1, 1, 8, 32)
    square = limoe.squares(cells)
    assert square.shape == (1, 1, 16, 16)
    assert square[0, 0, ::8, ::8].tolist() == [[0, 1], [2, 3]]


def test_how_modalities_divide_experts() -> None:
    own = torch.tensor([[[6, 6, 0, 0], [0, 0, 4, 0]]])  # the last expert has nobody
    found = limoe.sorted_by(own)
    assert found == {"pure": 1, "image spread": pytest.approx(2), "text spread": pytest.approx(1)}
    mixed = limoe.sorted_by(torch.ones(1, 2, 4).long())
    assert mixed == {"pure": 0, "image spread": pytest.approx(4), "text spread": pytest.approx(4)}


def test_what_may_be_chance_is_not_claimed() -> None:
    # standard errors: sqrt(0.09 / 900) = 0.01 of each, so 0.0141 of their difference
    assert verdict(0.9, 0.9 - 0.027, 900)[1] is None
    assert verdict(0.9, 0.9 - 0.032, 900)[1] is True
    assert verdict(0.9 - 0.032, 0.9, 900)[1] is False
    assert verdict(0.9, 0.8, 900)[0] == "0.9000 against 0.8000; by chance up to 0.0333"


def test_weights_go_from_one_room_to_another() -> None:
    model = model_of("vmoe-digits")
    other = same_weights(model, spec("vmoe-digits"), {"model.moe.capacity.factor": 2.0})
    assert not other.training
    assert other.state_dict().keys() == model.state_dict().keys()


# In short


def ran(command: click.Command, folder: Path) -> dict[str, Any]:
    """What the example left, or nothing where its data cannot be had."""
    result = CliRunner().invoke(command, ["--quick", "--out", str(folder)])
    if result.exit_code == 2 and "fetch" in result.output:
        pytest.skip(result.output)
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads((folder / "results.json").read_text())
    assert all(run["held_out"] for run in data["runs"])
    assert all(claim["holds"] in (True, False, None) for claim in data["claims"])
    return data


def same_work(runs: list[dict[str, Any]], share: float) -> bool:
    """Whether all runs cost about as much for a row."""
    flops = [run["flops"] for run in runs]
    return max(flops) < (1 + share) * min(flops)


def test_v_moe(tmp_path: Path) -> None:
    data = ran(v_moe.main, tmp_path)
    assert [run["system"] for run in data["runs"]] == list(v_moe.SYSTEMS)
    assert same_work(data["runs"], 0.02)
    assert len(data["runs"][1]["notes"]) == 2 + 2 + 1
    assert {"room.png", "patches-digits.png"} <= {place.name for place in tmp_path.iterdir()}


def test_soft_moe(tmp_path: Path) -> None:
    data = ran(soft_moe.main, tmp_path)
    assert same_work(data["runs"], 0.06)
    notes = {run["system"]: run["notes"] for run in data["runs"][1:]}
    assert notes["Soft MoE"]["unseen"] == 0 < notes["Experts Choice"]["unseen"]
    assert (tmp_path / "loads-digits-soft-moe.png").exists()


def test_claims_on_more_experts_follow_from_the_runs() -> None:
    runs = []
    for system, right in (("Soft MoE", 0.9), ("Soft MoE, 1 x 16", 0.8), ("Soft MoE, 16 x 1", 0.7)):
        run = Run(system, on="MNIST")
        run.measure(1, {"accuracy": right})
        runs.append(run)
    accuracy = soft_moe.experts_to_accuracy(runs)
    assert accuracy == {1: 0.8, 8: 0.9, 16: 0.7}
    assert [claim.holds for claim in soft_moe.grown("", accuracy, 900)] == [False]
    assert soft_moe.grown("", {8: 0.9}, 900) == []
    assert soft_moe.of_division(runs) is not None


def test_gmoe(tmp_path: Path) -> None:
    data = ran(gmoe.main, tmp_path)
    assert same_work(data["runs"], 0.04)
    assert len(data["runs"][1]["notes"]) == len(gmoe.SEEN + gmoe.UNSEEN) + 1


def test_switch(tmp_path: Path) -> None:
    data = ran(switch_spans.main, tmp_path)
    assert [run["system"] for run in data["runs"]] == ["T5", "Switch, 8 experts"]
    assert same_work(data["runs"], 0.02)
    notes = data["runs"][1]["notes"]
    assert 0 <= notes["refused"] <= 1 <= notes["busiest over mean"] <= 8
    assert data["claims"][0]["holds"] == (
        data["runs"][1]["held_out"][-1][1]["nats"] < data["runs"][0]["held_out"][-1][1]["nats"]
    )


def test_claims_on_switch_follow_from_the_runs() -> None:
    nats = dict.fromkeys(switch_spans.SYSTEMS, 2.0) | {"T5": 2.5, "Switch, 32 experts": 2.1}
    runs = []
    for system, last in nats.items():
        run = Run(system)
        for step, value in ((0, 5.0), (50, last + 0.2), (100, last)):
            run.measure(step, {"nats": value})
        even = system != switch_spans.UNEVEN
        room = {switch_spans.at(r): 2 + 0.02 * (r < 1) for r in switch_spans.ROOMS}
        run.notes = {"refused": 0.005 if even else 0.3, "busiest over mean": 1.2 if even else 5}
        run.notes |= room
        runs.append(run)
    found = switch_spans.claims(runs)
    assert [claim.holds for claim in found] == [True, True, False, True, True, True]
    assert found[1].seen == "T5's 2.500 nats after 100 steps, Switch's after 50"
    assert "5.00 without" in found[-1].seen


def test_limoe(tmp_path: Path) -> None:
    data = ran(limoe.main, tmp_path)
    assert same_work(data["runs"], 0.02)
    assert {"pure", "texts refused"} <= data["runs"][1]["notes"].keys()
    assert (tmp_path / "modalities.png").exists()


def test_mistakes_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise MoegenError("there is no data")

    monkeypatch.setattr(gmoe, "mnist_5k", gone)
    result = CliRunner().invoke(gmoe.main, ["--quick", "--out", str(tmp_path)])
    assert (result.exit_code, result.output.splitlines()[-1]) == (2, "error: there is no data")
