"""Shipped presets of `moe` are the published systems, and every one makes a model that trains."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from preset_specs import laid_over, tiny_over

import moegen
from moegen.spec import presets

NAMES = presets.names("moe")
OWN = [name for name in NAMES if "Short for" not in str(presets.about("moe", name).notes)]


@dataclass(frozen=True)
class Row:
    """What the table of published systems says; losses by their weights.

    capacity: factors in training and evaluation, the convention and the minimum; layers: those
    that are routed of 24.
    """

    k: int
    gate: str = "none"
    noise: str | None = None
    score: str = "linear"
    capacity: tuple[float, Any, str, int] | None = None
    second: tuple[str, float] | None = None
    losses: dict[str, float] = field(default_factory=dict)
    layers: range | list[int] = field(default_factory=lambda: range(24))
    shared: int = 0
    select: str = "top_k"


A, B = "per_token", "per_choice"
SECOND, FOURTH = range(1, 24, 2), range(3, 24, 4)
BALANCE = {"balance": 0.01}
SWITCH = (1.25, 2.0, A, 4)
VMOE = {"importance": 0.005, "load": 0.005}
SIXTH = 0.006667
LIMOE = ("importance", "load", "z", "text_local", "text_global", "image_global")
GROUPS = {"balance": 0.003, "device_balance": 0.05, "communication_balance": 0.02}
OPEN = {"balance": 0.01, "z": 1e-4}
GSHARD = Row(2, "sum", None, "linear", (2.0, None, A, 0), ("random", 0.5), BALANCE, SECOND)

MATRIX: dict[str, Row] = {
    "shazeer2017-lm": Row(
        4, "softmax_over_kept", "learned", losses={"importance": 0.1, "load": 0.1}, layers=[12]
    ),
    "gshard-m4": GSHARD,
    "switch-base": Row(1, "none", "jitter", capacity=SWITCH, losses=BALANCE, layers=SECOND),
    "switch-c": Row(1, "none", "jitter", capacity=(1.0, 2.0, A, 2), losses=BALANCE),
    "glam": Row(
        2, "sum", None, "linear", (2.0, None, A, 0), ("all", 0.2), BALANCE, range(0, 24, 2)
    ),
    "st-moe": Row(
        2, "sum", "jitter", "linear", SWITCH, ("random", 0.2), {**BALANCE, "z": 0.001}, FOURTH
    ),
    "artetxe-moe": Row(2, "sum", None, "linear", (2.0, None, A, 0), ("all", 0.2), BALANCE, SECOND),
    "nllb-moe": Row(2, "sum", None, "linear", (2.0, None, A, 0), ("all", 0.2), BALANCE, FOURTH),
    "v-moe": Row(2, "none", "gaussian", capacity=(1.05, None, B, 0), losses=VMOE, layers=SECOND),
    "expert-choice": Row(0, select="expert_choice", layers=SECOND),
    "base": Row(1, select="balanced", layers=[12]),
    "hash": Row(1, score="table", layers=[23]),
    "soft-moe": Row(0, score="cosine", select="soft", layers=range(12, 24)),
    "x-moe": Row(1, score="cosine", capacity=SWITCH, losses=BALANCE, layers=SECOND),
    "gmoe": Row(
        1,
        "none",
        "gaussian",
        "cosine",
        (1.5, None, "per_rank", 0),
        losses=VMOE,
        layers=[20, 22],
    ),
    "limoe": Row(
        1,
        "none",
        "gaussian",
        capacity=(1.05, None, B, 0),
        losses=dict.fromkeys(LIMOE, SIXTH),
        layers=SECOND,
    ),
    "maskmoe": Row(1, capacity=SWITCH, losses=BALANCE),
    "task-moe": GSHARD,
    "deepseekmoe-16b": Row(6, losses={"balance": 0.001}, layers=range(1, 24), shared=2),
    "deepseek-v2": Row(
        6,
        capacity=(1.0, "unlimited", A, 0),
        losses=GROUPS,
        layers=range(1, 24),
        shared=2,
    ),
    "deepseek-v3": Row(8, "sum", losses={"sequence_balance": 1e-4}, layers=range(3, 24), shared=1),
    "mixtral-8x7b": Row(2, "softmax_over_kept"),
    "openmoe-8b": Row(2, capacity=SWITCH, losses=OPEN, layers=[5, 11, 17, 23]),
    "dmoe": Row(1, losses={"balance": 0.1}),
    "mmoe": Row(16, select="all", layers=[23]),
    "mod-squad": Row(2, "none", "learned", losses={"mutual_information": 0.0005}),
    "chen2022-toy": Row(1, "none", "uniform", layers=[23]),
    "jacobs1991": Row(16, select="all"),
    "hme1994": Row(2, select="all"),
}


def moe_of(name: str) -> Any:
    return moegen.load(tiny_over(name, 24)).spec.model.moe


def row_of(name: str) -> Row:
    moe = moe_of(name)
    router, capacity, placement = moe.router, moe.capacity, moe.placement
    second = getattr(router.select, "second", None)
    bound = None
    if capacity:
        bound = (capacity.factor, capacity.eval_factor, capacity.convention, capacity.minimum)
    return Row(
        moe.chosen,
        router.gate.normalize,
        router.noise.kind if router.noise else None,
        router.score.kind,
        bound,
        (second.policy, second.threshold) if second else None,
        {loss: element.weight for loss, element in moe.losses.items()},
        list(placement.of(24) or placement.inserted(24)),
        moe.shared.count if moe.shared else 0,
        router.select.kind,
    )


@pytest.mark.parametrize("name", MATRIX)
def test_a_preset_says_what_its_row_says(name: str) -> None:
    found, wanted = row_of(name), MATRIX[name]
    for key, value in vars(wanted).items():
        value = list(value) if key == "layers" else value
        assert getattr(found, key) == value, key


def test_every_row_has_a_preset_and_every_preset_a_row() -> None:
    assert len(MATRIX) == 29
    for name in set(NAMES) - set(MATRIX):
        section = presets.read("moe", name).data
        assert section.pop("preset") in MATRIX
        told = presets.about("moe", name)
        assert not section or name == "shazeer2017-hierarchical", "an alias says nothing of its own"
        assert section or told.notes == f"Short for {presets.read('moe', name).data['preset']}."


FACTS: dict[str, dict[str, Any]] = {
    "gshard-m4": {"losses.balance.count": "first", "router.select.second.eval_policy": "all"},
    "switch-base": {"router.noise.eps": 0.01, "capacity.rounding": "floor"},
    "st-moe": {"extra.activation.kind": "geglu", "router.noise.eps": 0.01},
    "artetxe-moe": {
        "router.gate.after_drop": True,
        "capacity.round_first": "share_up",
        "capacity.eval_share": 0.25,
    },
    "nllb-moe": {"router.gate.after_drop": True, "capacity.eval_share": 0.25},
    "v-moe": {
        "router.noise.std": "1/E",
        "capacity.rounding": "ceil",
        "capacity.multiple": 4,
        "capacity.priority": "rank",
        "losses.importance.of": "scores",
        "losses.load.threshold": "kth",
    },
    "expert-choice": {"router.select.factor": 2.0},
    "base": {
        "router.gate.blend": True,
        "router.affinity.kind": "sigmoid",
        "experts.residual": True,
    },
    "hash": {"router.score.by": "random"},
    "soft-moe": {"router.score.temperature": "scale", "router.score.eps": 1e-6},
    "x-moe": {"router.score.temperature": "divide", "router.affinity.kind": "softmax"},
    "gmoe": {
        "router.score.temperature": "exp",
        "router.score.bias": True,
        "router.score.dim": 256,
        "capacity.priority": "confidence",
        "capacity.round_first": "share_up",
    },
    "limoe": {"capacity.priority": "confidence", "losses.text_global.spread": 9.0},
    "maskmoe": {"router.restrict.kind": "visible", "router.restrict.rare": 1},
    "task-moe": {"router.input.id": "task"},
    "deepseekmoe-16b": {"losses.balance.count": "mean"},
    "deepseek-v2": {
        "router.restrict.groups": 8,
        "router.restrict.keep": 3,
        "router.restrict.by": "max",
        "router.gate.scale": 16.0,
        "capacity.devices": 8,
        "capacity.priority": "weight",
        "losses.communication_balance.limit": 3,
    },
    "deepseek-v3": {
        "router.affinity.kind": "sigmoid",
        "router.balance_bias.rate": 0.001,
        "router.restrict.groups": 8,
        "router.restrict.keep": 4,
        "router.restrict.by": "top2_sum",
        "router.gate.scale": 2.5,
    },
    "openmoe-8b": {"losses.balance.reduction": "mean", "losses.z.reduction": "mean"},
    "dmoe": {"losses.balance.count": "mean", "losses.balance.reduction": "mean"},
    "mmoe": {"router.gates.id": "task"},
    "mod-squad": {"router.gates.id": "task", "router.gate.normalize": "none"},
    "chen2022-toy": {
        "router.noise.selection_only": True,
        "router.input.kind": "sentence",
        "experts.activation.kind": "cubic",
    },
    "hme1994": {"experts.nested.router.select.kind": "all"},
}


@pytest.mark.parametrize("name", FACTS)
def test_what_is_particular_to_a_preset(name: str) -> None:
    for path, wanted in FACTS[name].items():
        value = moe_of(name)
        for key in path.split("."):
            value = value[key] if isinstance(value, dict) else getattr(value, key)
        assert value == wanted, path


@pytest.mark.parametrize("name", OWN)
def test_a_preset_is_built_for_any_batch(name: str, tmp_path: Path) -> None:
    folder = moegen.build({**tiny_over(name), "name": "tiny"}, tmp_path / "tiny")
    assert moegen.check(folder) == []
    for tool in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *tool, "--isolated", "."]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", OWN)
def test_a_preset_trains_and_is_evaluated(name: str) -> None:
    torch.manual_seed(0)
    plan = moegen.plan(tiny_over(name), batch=2, sequence=16)
    model = moegen.module(plan).Model()
    assert plan.spec.model.routed(), "no layer is routed"
    ids = torch.randint(256, (2, 16))
    given = {key: torch.tensor([0, 1]) for key in plan.spec.model.given()}
    total, output = model.training_loss(ids, **given)
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if hasattr(model, "update_balance"):
        model.update_balance(output.routing)
    model.eval()
    with torch.no_grad():
        assert model(ids, **given).logits.isfinite().all()


def advice() -> list[tuple[str, str]]:
    """The pieces of YAML in notes: sections of a whole spec, or keys of `moe`."""
    found = []
    for name in NAMES:
        pieces = (presets.about("moe", name).notes or "").split("`")[1::2]
        found += [(name, piece) for piece in pieces if ": " in piece]
    return found


@pytest.mark.parametrize(("name", "piece"), advice())
def test_what_notes_advise_can_be_said(name: str, piece: str) -> None:
    ((path, value),) = yaml.safe_load(piece).items()
    keys = path.split(".")
    keys = keys if keys[0] in ("init", "train", "model") else ["model", "moe", *keys]
    for key in reversed(keys):
        value = {key: value}
    before = moegen.load(tiny_over(name)).spec
    assert moegen.load(laid_over(tiny_over(name), value)).spec != before
