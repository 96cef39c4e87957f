"""Mixtures on vectors: emitted code is the graph, with its FLOPs, its bytes and its sizes."""

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
from vector_specs import BATCH, MIXTURES, batch_of, mixture

import moegen
from moegen.api import load
from moegen.backend import backend
from moegen.emit.package import package
from moegen.emit.write import write
from moegen.graph.execute import tensors
from moegen.passes.sizes import prove_sizes

NAMES = sorted(MIXTURES)


def plan(name: str) -> moegen.Plan:
    return planned(MIXTURES[name], BATCH)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NAMES)
def test_emitted_equals_graph_bit_for_bit(name: str, training: bool) -> None:
    source = MIXTURES[name]
    model = made(source).train(training)
    graph = twin(source, model)
    x, _ = batch_of(source)
    outs = []
    for each in (model, graph):
        torch.manual_seed(3)
        outs.append(each(x))
    ours, theirs = outs
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        assert torch.equal(a, b)
    if training:
        for out in outs:
            out.outputs.float().square().mean().backward()
        gradients = dict(graph.named_parameters())
        for key, parameter in model.named_parameters():
            assert (parameter.grad is None) == (gradients[key].grad is None), key
            if parameter.grad is not None:
                assert torch.equal(parameter.grad, gradients[key].grad), key


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_trained_by_the_loss(name: str) -> None:
    model = made(MIXTURES[name]).train()
    loss, _ = model.training_loss(*batch_of(MIXTURES[name]))
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    model = made(MIXTURES[name]).train()
    x, _ = batch_of(MIXTURES[name])
    with counter() as forward:
        out = model(x)
    with counter() as backward:
        (
            out.outputs.float().square().mean() + (out[1] ** 2).sum() * ("gates" in out._fields)
            if "gates" in out._fields
            else out.outputs.float().square().mean()
        ).backward()
    assert declared(plan(name).costs["forward"]) == (
        forward.get_total_flops(),
        backward.get_total_flops(),
    )


@pytest.mark.parametrize("name", NAMES)
def test_saved_bytes_are_what_autograd_keeps(name: str) -> None:
    model = made(MIXTURES[name]).train()
    x, y = batch_of(MIXTURES[name])
    found = kept(lambda: model(x))
    assert plan(name).costs["forward"].saved == distinct_bytes(found, own(model, x))
    out = model(x)
    given = [v.detach().requires_grad_() for v in out[: 1 + ("gates" in out._fields)]]
    found = kept(lambda: model.loss(given[0], y, *given[1:]))
    assert plan(name).costs["loss"].saved == distinct_bytes(found, [*given, y])


@pytest.mark.parametrize("name", NAMES)
def test_no_size_of_a_batch_is_baked_in(name: str) -> None:
    prove_sizes(load(MIXTURES[name]))
    x, y = batch_of(MIXTURES[name], count=1)
    assert torch.isfinite(made(MIXTURES[name]).training_loss(x, y)[0])


@pytest.mark.parametrize("name", NAMES)
def test_estimates_count_the_model(name: str) -> None:
    estimate = moegen.estimate(MIXTURES[name], batch=3)
    model: Any = imported(MIXTURES[name]).Model()
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


@pytest.mark.parametrize("name", ["patches", "unlike"])
def test_a_package_with_kernels_computes_what_one_without_does(name: str) -> None:
    source = MIXTURES[name]
    model = made(source)
    fused = filled(moegen.module(source, backend="triton").Model)
    fused.load_state_dict(model.state_dict())
    x, y = batch_of(source)
    losses = []
    for each in (model, fused):
        loss, _ = each.eval().training_loss(x, y)
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    theirs = dict(fused.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(theirs[key].grad, parameter.grad, rtol=1e-3, atol=1e-5)


_ = mixture
