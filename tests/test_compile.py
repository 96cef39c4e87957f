"""Emitted models under torch.compile and torch.export: whole graphs, and the same numbers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tiny_models import imported, made, token_ids
from tiny_specs import SPECS, moe, spec
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint

from moegen.graph.execute import tensors

# Dynamo makes an object of every autograd.Function that it meets, which torch itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

# Between them: capacity, groups and biases, latent attention, sinks, windows, experts that choose,
# and 16-bit formats.
COMPILED = ["capacity-per-choice", "deepseek-v3-like", "gpt-oss-like", "expert-choice", "bf16"]
EXPORTED = [
    *(("plain-moe", "strict"), ("plain-moe", "traced"), ("capacity-per-choice", "strict")),
    *(("deepseek-v3-like", "traced"), ("gpt-oss-like", "traced"), ("windowed", "strict")),
    *(("expert-choice", "traced"), ("bf16", "strict"), ("mixed", "traced")),
]


def short(name: str) -> dict[str, Any]:
    """A tiny spec with two layers: compilers go through every one of them."""
    source = SPECS[name]
    return {**source, "model": {**source["model"], "layers": 2}}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def outcome(model: Any, ids: Tensor, run: Any = None) -> list[Tensor]:
    """All outputs of a training step, and all gradients."""
    model.zero_grad()
    torch.manual_seed(0)
    output = (model if run is None else run)(ids)
    loss = model.loss(output.logits, ids) + sum(getattr(output, "losses", {}).values())
    loss.backward()
    return [*tensors(output), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_is_one_graph_and_trains_to_the_same_bits(name: str) -> None:
    model = made(short(name)).train()
    ours = outcome(model, token_ids())
    theirs = outcome(model, token_ids(), torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_compiled_model_takes_padding_and_other_sizes_without_a_break() -> None:
    model = made("plain-moe").eval()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=True)
    for batch, length in ((2, 12), (3, 20), (2, 7)):
        ids = token_ids(batch, length)
        mask = torch.ones(batch, length, dtype=torch.bool)
        mask[1, length // 2 :] = False
        ours, theirs = tensors(model(ids, mask)), tensors(compiled(ids, mask))
        assert all(map(torch.equal, ours, theirs))
    assert graphs.frame_count == 1


def test_decoding_compiles_once_for_all_positions() -> None:
    model, ids = made(short("gpt-oss-like")).eval(), token_ids(2, 6)
    graphs = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.step, fullgraph=True, backend=graphs)
    ours, theirs = model.new_cache(2, 8), model.new_cache(2, 8)
    with torch.no_grad():
        for place in range(6):
            at, token = torch.tensor(place), ids[:, place : place + 1]
            assert torch.equal(model.step(token, at, ours), step(token, at, theirs))
    assert all(map(torch.equal, tensors(ours), tensors(theirs)))
    assert graphs.frame_count == 1


@pytest.mark.parametrize(("name", "mode"), EXPORTED)
def test_an_exported_model_takes_any_batch_and_sequence(name: str, mode: str) -> None:
    """Where windows are, any sequence longer than a window."""
    model = made(short(name)).eval()
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    example = (token_ids(3, 16), torch.ones(3, 16, dtype=torch.bool))
    shapes = {"ids": sizes, "mask": sizes}
    exported = export(model, example, dynamic_shapes=shapes, strict=mode == "strict").module()
    for batch, length in ((2, 23), (5, 20)):
        ids, mask = token_ids(batch, length), torch.ones(batch, length, dtype=torch.bool)
        mask[1, 15:] = False
        ours, theirs = tensors(model(ids, mask)), tensors(exported(ids, mask))
        assert all(map(torch.equal, ours, theirs))


def test_two_packages_work_in_one_process() -> None:
    """Their ops have one name in torch.ops.moegen, and their classes are their own."""
    one, other = made("plain-moe").train(), made("bf16").train()
    assert type(one) is not type(other)
    alone = outcome(one, token_ids())
    outcome(other, token_ids())
    between = outcome(one, token_ids(), torch.compile(one, fullgraph=True, backend="aot_eager"))
    assert all(map(torch.equal, alone, between))
    assert imported("plain-moe").Output is not imported("bf16").Output


def test_inductor_gives_the_numbers_of_eager_code() -> None:
    source = spec("inductor", {"layers": 1, "moe": moe(capacity=1.0)})
    model = made(source).train()
    ours = outcome(model, token_ids())
    with warnings.catch_warnings():
        # Inductor's own modules call names that torch has deprecated.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*")
        theirs = outcome(model, token_ids(), torch.compile(model, fullgraph=True))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_a_compiled_layer_may_stand_inside_a_checkpoint() -> None:
    """Hooks of a checkpoint are on while its layer is traced."""
    layer = made("plain-moe").layers[0].moe
    x, valid = torch.randn(2, 12, 32, requires_grad=True), torch.ones(24, dtype=torch.bool)

    def run(x: Tensor) -> Tensor:
        return layer(x, valid)[0]  # type: ignore[no-any-return]

    found = []
    for one in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        x.grad = None
        checkpoint(one, x, use_reentrant=False).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
