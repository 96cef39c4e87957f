"""Every policy of routing: emitted code is the graph, is clean, is general, and learns."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from routing_specs import ROUTED
from tiny_models import imported, made, planned, token_ids, twin
from torch import Tensor

from moegen.api import load
from moegen.backend import backend
from moegen.emit.package import package
from moegen.emit.write import write
from moegen.graph.execute import Executable, tensors
from moegen.passes.sizes import prove_sizes

NAMES = sorted(ROUTED)
CACHE = Path(__file__).parent.parent / ".mypy_cache" / "emitted"  # torch is read but once
MASK = torch.arange(12) < torch.tensor([[12], [9]])

# Parameters that no gradient can reach, and why.
UNREACHED = {"constant-gate": {"router"}}  # weights of one do not depend on scores


def run(model: Any, name: str, mask: Tensor | None) -> Any:
    """An output for random tokens and, where routers read ids, one for each sequence."""
    names = planned(ROUTED[name]).spec.model.given()
    torch.manual_seed(3)
    if isinstance(model, Executable):
        return model(token_ids(), mask, *(torch.tensor([0, 1]) for _ in names))
    return model(token_ids(), mask, **{key: torch.tensor([0, 1]) for key in names})


@pytest.mark.parametrize("name", NAMES)
def test_emitted_equals_graph_bit_for_bit(name: str) -> None:
    model = made(ROUTED[name])
    graph = twin(ROUTED[name], model)
    for training, mask in product((True, False), (None, MASK)):
        model.train(training)
        graph.train(training)
        ours, theirs = run(model, name, mask), run(graph, name, mask)
        pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
        assert pairs
        for a, b in pairs:
            assert torch.equal(a, b)
            assert a.isfinite().all()
        if training:
            learn(ours, model)
            learn(theirs, graph)
            gradients = dict(graph.named_parameters())
            for key, parameter in model.named_parameters():
                other = gradients[key].grad
                if parameter.grad is None:
                    assert other is None
                else:
                    assert torch.equal(parameter.grad, other), key


def learn(output: Any, model: torch.nn.Module) -> None:
    """Gradients of an output and its losses."""
    model.zero_grad()
    loss = output.logits.square().mean() + sum(output.losses.values())
    loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_that_matters_has_a_finite_gradient(name: str) -> None:
    model = made(ROUTED[name]).train()
    for mask in (None, MASK):
        learn(run(model, name, mask), model)
        without = {k.split(".")[-1] for k, p in model.named_parameters() if p.grad is None}
        assert without == UNREACHED.get(name, set())
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", NAMES)
def test_no_size_of_a_batch_is_baked_in(name: str) -> None:
    prove_sizes(load(ROUTED[name], ["model.layers=1"]))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_plan(name: str) -> None:
    with torch.device("meta"):
        model = imported(ROUTED[name]).Model()
    totals = planned(ROUTED[name]).root.totals()
    assert sum(p.numel() for p in model.parameters()) == sum(n for n, _, _ in totals.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All packages side by side."""
    place = tmp_path_factory.mktemp("routed")
    for name in NAMES:
        write(
            package(planned(ROUTED[name]), backend("eager")),
            place / name.replace("-", "_"),
            force=False,
        )
    return place


def tool(*command: str, cwd: Path) -> None:
    line = [sys.executable, "-m", *command]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_emitted_code_is_clean(folder: Path) -> None:
    tool("ruff", "check", "--isolated", ".", cwd=folder)
    tool("ruff", "format", "--isolated", "--check", ".", cwd=folder)


def test_emitted_code_is_typed(folder: Path) -> None:
    names = [place.name for place in folder.iterdir() if (place / "model.py").exists()]
    assert len(names) == len(NAMES)
    tool("mypy", "--strict", "--cache-dir", str(CACHE), *names, cwd=folder)
