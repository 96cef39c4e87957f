"""Emitted code computes what the graph computes, and reads as a colleague's code should."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_models
import torch
from image_specs import TOWERS, VISION
from tiny_specs import SPECS
from torch import Tensor, nn

import moegen
from moegen.backend import backend
from moegen.emit.package import package
from moegen.emit.write import write
from moegen.graph.execute import Executable, tensors
from moegen.planner import Plan

NAMES = sorted(SPECS)
OTHERS = {
    **VISION,
    **{f"tower-{n}": s for n, s in TOWERS.items()},
}  # kinds of models whose other tests are apart


@cache
def planned(name: str) -> Plan:
    return moegen.plan(SPECS[name], batch=2, sequence=12)


@cache
def imported(name: str) -> ModuleType:
    return moegen.module(planned(name))


def made(name: str) -> Any:
    """The emitted model, with parameters that make every part matter."""
    torch.manual_seed(0)
    model = imported(name).Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("balance_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model


def twin(name: str, model: nn.Module) -> Executable:
    """The graph itself, run node by node with the same parameters."""
    graph = Executable(planned(name).root)
    graph.load_state_dict(model.state_dict())
    graph.train(model.training)
    return graph


def token_ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NAMES)
def test_emitted_equals_graph_bit_for_bit(name: str, training: bool) -> None:
    model = made(name).train(training)
    graph = twin(name, model)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 9:] = False
    torch.manual_seed(3)
    ours = model(token_ids(), mask)
    torch.manual_seed(3)
    theirs = graph(token_ids(), mask)
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert pairs
    for a, b in pairs:
        assert torch.equal(a, b)
    if training:
        ours.logits.float().square().mean().backward()
        theirs.logits.float().square().mean().backward()
        gradients = dict(graph.named_parameters())
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert torch.equal(parameter.grad, gradients[key].grad), key


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_plan(name: str) -> None:
    totals = planned(name).root.totals()
    with torch.device("meta"):
        model = imported(name).Model()
    assert model.num_parameters() == sum(count for count, _, _ in totals.values())


# Decoding differs by design where experts see all tokens at once, where a capacity drops, and
# where rotary frequencies depend on the length; 16-bit formats differ by rounding.
BY_DESIGN = {"expert-choice", "switch-like", "capacity-per-choice", "overrides", "fp64"}
BY_LENGTH = {"long-ropes", "longrope"}
ROUNDED = {"bf16", "mixed"}
CAUSAL = [n for n in NAMES if n not in BY_DESIGN | BY_LENGTH | ROUNDED]


@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_gives_the_logits_of_the_forward_pass(name: str) -> None:
    model = made(name).eval()
    ids = token_ids()
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.new_cache(2, 16)
        first = model.step(ids[:, :7], torch.tensor(0), cache)
        rest = [model.step(ids[:, i : i + 1], torch.tensor(i), cache) for i in range(7, 12)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tiny specs emitted side by side."""
    place = tmp_path_factory.mktemp("emitted")
    for name in NAMES:
        made = package(planned(name), backend("eager"))
        write(made, place / name.replace("-", "_"), force=False)
    for name, source in OTHERS.items():
        made = package(tiny_models.planned(source), backend("eager"))
        write(made, place / name.replace("-", "_"), force=False)
    return place


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_emitted_code_is_clean(folder: Path) -> None:
    run(sys.executable, "-m", "ruff", "check", "--isolated", ".", cwd=folder)
    run(sys.executable, "-m", "ruff", "format", "--isolated", "--check", ".", cwd=folder)


def test_emitted_code_is_typed(folder: Path) -> None:
    packages = [p.name for p in folder.iterdir() if (p / "model.py").exists()]
    run(sys.executable, "-m", "mypy", "--strict", *packages, cwd=folder)


def test_emitted_code_needs_torch_only(folder: Path) -> None:
    for place in folder.rglob("*.py"):
        assert "moegen." not in place.read_text().replace("ops.moegen", "").replace(
            "moegen::", ""
        ).replace("moegen check", ""), place
