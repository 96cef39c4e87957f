"""Mixtures and multi-task models of vectors: emitted code is the graph, in values and costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_flops import counter, declared
from kept_memory import distinct_bytes, kept, own
from tiny_models import filled, imported, made, planned, twin
from torch import Tensor
from vector_specs import ALL, BATCH, any_batch

import moegen
from moegen.api import load
from moegen.backend import backend
from moegen.emit.package import package
from moegen.emit.write import write
from moegen.graph.execute import tensors
from moegen.passes.sizes import prove_sizes

NAMES = sorted(ALL)


def plan(name: str) -> moegen.Plan:
    return planned(ALL[name], BATCH)


def heard(out: Any) -> list[Tensor]:
    """What the loss is of."""
    outputs = out.outputs.values() if isinstance(out.outputs, dict) else [out.outputs]
    return [*outputs, *([out.gates] if "gates" in out._fields else [])]


def total(out: Any) -> Tensor:
    """A number that depends on all of it."""
    return torch.stack([x.float().square().mean() for x in heard(out)]).sum()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NAMES)
def test_emitted_equals_graph_bit_for_bit(name: str, training: bool) -> None:
    source = ALL[name]
    model = made(source).train(training)
    graph = twin(source, model)
    x, _ = any_batch(source)
    outs = []
    for each in (model, graph):
        torch.manual_seed(3)
        outs.append(each(x))
    ours, theirs = outs
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        assert torch.equal(a, b)
    if training:
        for out in outs:
            total(out).backward()
        gradients = dict(graph.named_parameters())
        for key, parameter in model.named_parameters():
            assert (parameter.grad is None) == (gradients[key].grad is None), key
            if parameter.grad is not None:
                assert torch.equal(parameter.grad, gradients[key].grad), key


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_trained_by_the_loss(name: str) -> None:
    model = made(ALL[name]).train()
    loss, _ = model.training_loss(*any_batch(ALL[name]))
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    model = made(ALL[name]).train()
    x, _ = any_batch(ALL[name])
    with counter() as forward:
        out = model(x)
    with counter() as backward:
        total(out).backward()
    assert declared(plan(name).costs["forward"]) == (
        forward.get_total_flops(),
        backward.get_total_flops(),
    )


@pytest.mark.parametrize("name", NAMES)
def test_saved_bytes_are_what_autograd_keeps(name: str) -> None:
    model = made(ALL[name]).train()
    x, y = any_batch(ALL[name])
    found = kept(lambda: model(x))
    assert plan(name).costs["forward"].saved == distinct_bytes(found, own(model, x))
    known = list(y.values()) if isinstance(y, dict) else [y]
    given = [v.detach().requires_grad_() for v in heard(model(x))]
    made_of = [given[0], *known, *given[1:]]
    if isinstance(y, dict):
        made_of = [value for pair in zip(given, known, strict=True) for value in pair]
    found = kept(lambda: model.loss(*made_of))
    assert plan(name).costs["loss"].saved == distinct_bytes(found, made_of)


@pytest.mark.parametrize("name", NAMES)
def test_no_size_of_a_batch_is_baked_in(name: str) -> None:
    prove_sizes(load(ALL[name]))
    x, y = any_batch(ALL[name], count=1)
    assert torch.isfinite(made(ALL[name]).training_loss(x, y)[0])


@pytest.mark.parametrize("name", NAMES)
def test_estimates_count_the_model(name: str) -> None:
    estimate = moegen.estimate(ALL[name], batch=3)
    model: Any = imported(ALL[name]).Model()
    assert estimate.counts.total == model.num_parameters()
    assert estimate.decode_flops is None


def test_emitted_code_is_clean_and_typed(tmp_path: Path) -> None:
    for name in NAMES:
        write(package(plan(name), backend("eager")), tmp_path / name.replace("-", "_"), force=False)
    for command in (
        ("ruff", "check", "--isolated", "."),
        ("ruff", "format", "--isolated", "--check", "."),
        ("mypy", "--strict", *(name.replace("-", "_") for name in NAMES)),
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["patches", "unlike", "sparse-mmoe"])
def test_a_package_with_kernels_computes_what_one_without_does(name: str) -> None:
    source = ALL[name]
    model = made(source)
    fused = filled(moegen.module(source, backend="triton").Model)
    fused.load_state_dict(model.state_dict())
    x, y = any_batch(source)
    losses = []
    for each in (model, fused):
        loss, _ = each.eval().training_loss(x, y)
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    theirs = dict(fused.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(theirs[key].grad, parameter.grad, rtol=1e-3, atol=1e-5)
