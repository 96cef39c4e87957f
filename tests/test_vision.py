"""Vision models: emitted code is the graph, with its FLOPs, its bytes, its sizes and its loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_flops import counter, declared
from image_specs import BATCH, CLASSES, VISION, given, images, labels, ready, spec
from kept_memory import distinct_bytes, kept, own
from tiny_models import filled, imported, planned, twin

import moegen
from moegen.api import load
from moegen.graph.execute import tensors
from moegen.passes.sizes import prove_sizes

NAMES = sorted(VISION)


def plan(name: str) -> moegen.Plan:
    return planned(VISION[name], BATCH)


# Emitted code


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NAMES)
def test_emitted_equals_graph_bit_for_bit(name: str, training: bool) -> None:
    model = ready(name).train(training)
    graph = twin(VISION[name], model)
    more = given(name)
    torch.manual_seed(3)
    ours = model(images(name), **more)
    torch.manual_seed(3)
    outs = ours, graph(images(name), *more.values())
    for a, b in zip(tensors(outs[0]), tensors(outs[1]), strict=True):
        assert torch.equal(a, b)
    if training:
        for out in outs:
            out.logits.float().square().mean().backward()
        gradients = dict(graph.named_parameters())
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert torch.equal(parameter.grad, gradients[key].grad), key


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    model = ready(name).train()
    with counter() as forward:
        out = model(images(name), **given(name))
    with counter() as backward:
        (out.logits.float().square().mean() + sum(getattr(out, "losses", {}).values())).backward()
    found = (forward.get_total_flops(), backward.get_total_flops())
    assert declared(plan(name).costs["forward"]) == found


@pytest.mark.parametrize("name", NAMES)
def test_saved_bytes_are_what_autograd_keeps(name: str) -> None:
    model, batch = ready(name).train(), images(name)
    more = given(name)
    found = kept(lambda: model(batch, **more))
    aside = own(model, batch, *more.values())
    assert plan(name).costs["forward"].saved == distinct_bytes(found, aside)


@pytest.mark.parametrize("name", ["vit", "vit-average"])
def test_saved_bytes_of_the_loss_are_what_autograd_keeps(name: str) -> None:
    model, target = ready(name), labels()
    logits = torch.randn(BATCH, CLASSES, requires_grad=True)
    found = kept(lambda: model.loss(logits, target))
    assert plan(name).costs["loss"].saved == distinct_bytes(found, [logits, target])


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_images_is_computed(name: str) -> None:
    prove_sizes(load(VISION[name]))


@pytest.mark.parametrize("name", ["vit", "vmoe", "soft-moe", "gmoe", "mod-squad"])
def test_a_package_with_kernels_computes_what_one_without_does(name: str) -> None:
    plain = ready(name)
    fused = filled(moegen.module(VISION[name], backend="triton").Model)
    fused.load_state_dict(plain.state_dict())
    for model in (plain, fused):
        torch.manual_seed(3)
        loss, _ = model.training_loss(images(name), labels(), **given(name))
        loss.backward()
    theirs = dict(fused.named_parameters())
    for key, parameter in plain.named_parameters():
        if not key.endswith("key_bias"):  # a softmax does not see it, so its gradient is rounding
            error = (theirs[key].grad - parameter.grad).norm()
            assert error <= 4e-4 * parameter.grad.norm() + 1e-9, key


# What a whole model shows


def test_a_patch_is_a_square_of_the_image_in_the_order_of_rows() -> None:
    model = ready("vit")
    weight = torch.zeros_like(model.patches)
    weight[:12].view(12, 12).copy_(torch.eye(12))  # as many values as a patch has
    with torch.no_grad():
        model.patches.copy_(weight)
        model.patches_bias.zero_()
        model.positions.zero_()
    seen: list[Any] = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = images("vit")
    model(batch)
    tokens = seen[0]
    assert torch.equal(tokens[:, 0], model.class_token.expand(BATCH, -1))
    for row in range(4):
        for column in range(4):
            square = batch[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            found = tokens[:, 1 + 4 * row + column, :12]
            torch.testing.assert_close(found, square.flatten(1))


@pytest.mark.parametrize("before", [0, 1])
def test_sines_are_those_of_masked_autoencoders_in_fp64(before: int) -> None:
    """He et al. 2022: half of the width for the row and half for the column, sines first."""
    source = spec(
        "x",
        {
            "positions": "sincos",
            "d_model": 24,
            "pool": "token" if before else "average",
            "image": {"size": 15, "patch": 3},
        },
    )
    places = moegen.module(source).Model().positions
    assert places.shape == (before + 25, 24)
    assert not places[:before].any()
    for token in range(25):
        row, column = divmod(token, 5)
        expected = []
        for place in (row, column):
            angles = [place / 10000 ** (i / 6) for i in range(6)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(places[before + token], torch.tensor(expected))


def test_without_positions_patches_have_no_order() -> None:
    for name, alike in (("vit-attention", True), ("vit", False)):
        model, batch = ready(name).eval(), images(name)
        moved = torch.roll(batch, 2, dims=3)
        close = torch.allclose(model(batch).logits, model(moved).logits, atol=1e-5)
        assert close is alike


def test_an_attention_pool_is_the_formula() -> None:
    """One learned query, torch's own multi-head attention, then a network on a branch."""
    model = ready("vit-attention").eval()
    pool, x = model.pool, torch.randn(BATCH, 16, 32)
    torch_own = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        torch_own.in_proj_weight.copy_(torch.cat([pool.query, pool.key, pool.value]))
        torch_own.in_proj_bias.copy_(torch.cat([pool.query_bias, pool.key_bias, pool.value_bias]))
        torch_own.out_proj.weight.copy_(pool.output)
        torch_own.out_proj.bias.copy_(pool.output_bias)
        probe = pool.probe.expand(BATCH, 1, -1)
        out = torch_own(probe, x, x)[0][:, 0]
        h = torch.layer_norm(out, (32,), pool.ffn_norm, pool.ffn_norm_bias, 1e-6)
        expected = out + pool.ffn(h)
        torch.testing.assert_close(pool(x), expected)


def test_each_task_has_a_head_and_a_router() -> None:
    model, batch = ready("mod-squad").eval(), images("mod-squad", 4)
    mixed = torch.tensor([0, 1, 1, 0])
    logits = model(batch, task=mixed).logits
    for task in (0, 1):
        alone = model(batch, task=torch.full((4,), task)).logits
        chosen = mixed == task
        torch.testing.assert_close(logits[chosen], alone[chosen])
        assert not torch.allclose(logits[~chosen], alone[~chosen], atol=1e-3)
    loss, _ = model.training_loss(batch, labels(4), task=torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert model.head.grad[0].any()
    assert not model.head.grad[1].any()
    assert not model.layers[0].moe.router.grad[1].any()


def test_a_soft_mixture_keeps_the_images_of_a_batch_apart() -> None:
    model, batch = ready("soft-moe").eval(), images("soft-moe")
    together = model(batch).logits
    alone = torch.cat([model(one.unsqueeze(0)).logits for one in batch])
    torch.testing.assert_close(together, alone)


def test_the_best_patches_of_a_batch_come_first() -> None:
    """Batch prioritised routing: what is dropped has a lower score than all that is kept."""
    source = spec(
        "bpr",
        {
            "layers": 1,
            "moe": {
                "preset": "v-moe",
                "placement": "all",
                "experts": {"count": 1, "width": 24, "bias": True},
                "router": {"select": 1, "affinity": "sigmoid", "noise": "none"},
                "capacity": {"factor": 0.5, "multiple": 1, "priority": "confidence"},
                "losses": {"importance": 0, "load": 0},
            },
        },
    )
    model = filled(moegen.module(source).Model).eval()
    calls: list[Any] = []
    moe = model.layers[0].moe
    moe.register_forward_hook(lambda _, inputs, out: calls.append((inputs[0], out[0])))
    model(torch.randn(BATCH, 3, 8, 8))
    seen, out = (tokens.flatten(0, 1) for tokens in calls[0])
    scores = (seen @ moe.router.T).sigmoid().squeeze(-1)
    kept_tokens = out.abs().sum(-1) > 0
    assert int(kept_tokens.sum()) == math.ceil(BATCH * 17 / 2)
    assert scores[kept_tokens].min() > scores[~kept_tokens].max()


# The loss and the runtime


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_formula(smoothing: float) -> None:
    source = spec("x", {"head": {"smoothing": smoothing}})
    model, logits = moegen.module(source).Model(), torch.randn(4, CLASSES)
    target = torch.tensor([1, 4, -100, 0])
    shares = logits.double().log_softmax(-1)
    expected = 0.0
    for row, label in ((0, 1), (1, 4), (3, 0)):
        own_share = (1 - smoothing) * shares[row, label] + smoothing * shares[row].mean()
        expected -= own_share.item() / 3
    assert model.loss(logits, target).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["vit", "vmoe", "soft-moe", "gmoe", "mod-squad"])
def test_a_few_images_are_learned(name: str) -> None:
    torch.manual_seed(0)
    model = imported(VISION[name]).Model().train()
    batch, more = images(name, 8), given(name, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        loss, _ = model.training_loss(batch, labels(8), **more)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert torch.equal(model.predict(batch, **more), labels(8))
    shares = model.probabilities(batch, **more)
    torch.testing.assert_close(shares.sum(-1), torch.ones(8))
    assert torch.equal(shares.argmax(-1), labels(8))


def test_a_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = ready("vit-average").eval()
    model.save(tmp_path / "x.safetensors")
    again = type(model).load(tmp_path / "x.safetensors").eval()
    batch = images("vit-average")
    assert torch.equal(model(batch).logits, again(batch).logits)  # its buffer is made anew
