"""Images and texts in one tower: emitted code is the graph, and what is apart stays apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from counted_flops import counter, declared
from image_specs import TOWERS
from kept_memory import distinct_bytes, kept, own
from tiny_models import filled, imported, twin
from torch import Tensor

import moegen
from moegen.api import load
from moegen.arch.account import accounts
from moegen.errors import MoegenError
from moegen.graph.execute import tensors
from moegen.passes.sizes import prove_sizes

NAMES = sorted(TOWERS)
PAIRS, PATCHES, LENGTH = 3, 16, 9


def ready(name: str) -> Any:
    return filled(imported(TOWERS[name]).Model)


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Images, ids, and a mask that leaves texts of 9, 5 and 1 tokens."""
    chance = torch.Generator().manual_seed(1)
    images = torch.randn(PAIRS, 1, 8, 8, generator=chance)
    ids = torch.randint(11, (PAIRS, LENGTH), generator=chance)
    return images, ids, torch.arange(LENGTH) < torch.tensor([[9], [5], [1]])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NAMES)
def test_emitted_equals_graph_bit_for_bit(name: str, training: bool) -> None:
    model = ready(name).train(training)
    outs = []
    for each in (model, twin(TOWERS[name], model)):
        torch.manual_seed(3)
        outs.append(each(*pairs()))
    for a, b in zip(tensors(outs[0]), tensors(outs[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_flops_and_bytes_are_those_of_torch(name: str) -> None:
    model, (images, ids, _) = ready(name).train(), pairs()
    plan = moegen.plan(TOWERS[name], batch=PAIRS, sequence=LENGTH).costs
    with counter() as forward:
        out = model(images, ids)
    with counter() as backward:
        (model.loss(out.logits) + sum(getattr(out, "losses", {}).values())).backward()
    found = (forward.get_total_flops(), backward.get_total_flops())
    assert declared(plan["forward"]) == found
    saved = kept(lambda: model(images, ids))
    assert plan["forward"].saved == distinct_bytes(saved, own(model, images, ids))
    logits = torch.randn(PAIRS, PAIRS, requires_grad=True)
    assert plan["loss"].saved == distinct_bytes(kept(lambda: model.loss(logits)), [logits])


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_pairs_is_computed(name: str) -> None:
    prove_sizes(load(TOWERS[name]))


def test_a_package_with_kernels_computes_what_one_without_does() -> None:
    plain = ready("limoe")
    fused = filled(moegen.module(TOWERS["limoe"], backend="triton").Model)
    fused.load_state_dict(plain.state_dict())
    for model in (plain, fused):
        torch.manual_seed(3)
        model.training_loss(*pairs())[0].backward()
    theirs = dict(fused.named_parameters())
    for key, parameter in plain.named_parameters():
        if not key.endswith("key_bias"):  # a softmax does not see it, so its gradient is rounding
            error = (theirs[key].grad - parameter.grad).norm()
            assert error <= 4e-4 * parameter.grad.norm() + 1e-9, key


def test_the_loss_is_the_formula() -> None:
    logits = torch.randn(4, 4)
    found = moegen.module(TOWERS["dense"]).Model().loss(logits).item()
    wide = logits.double()
    expected = 0.0
    for i in range(4):
        row = sum(math.exp(wide[i, j]) for j in range(4))
        column = sum(math.exp(wide[j, i]) for j in range(4))
        expected += (math.log(row) + math.log(column) - 2 * wide[i, i].item()) / 8
    assert found == pytest.approx(expected, rel=1e-6)


def test_either_side_is_alone_without_experts() -> None:
    """Attention is within an image and within a text, whose padding is not there."""
    model, (images, ids, mask) = ready("dense").eval(), pairs()
    out = model(images, ids, mask)
    other = model(torch.randn_like(images), ids.masked_fill(~mask, 0), mask)
    torch.testing.assert_close(out.texts, other.texts)
    assert not torch.allclose(out.images, other.images, atol=1e-3)
    alone = model(images[1:2], ids[1:2, :5])
    torch.testing.assert_close(out.texts[1:2], alone.texts)
    torch.testing.assert_close(out.images[1:2], alone.images)


def test_similarities_are_cosines_times_a_learned_factor() -> None:
    model, batch = imported(TOWERS["dense"]).Model().eval(), pairs()
    out = model(*batch)
    cosines = model.similarity(*batch)
    assert cosines.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(out.logits, cosines / 0.07)
    torch.testing.assert_close(out.texts.norm(dim=-1), torch.ones(PAIRS))


def test_loads_and_losses_are_told_for_images_and_texts() -> None:
    model, (images, ids, mask) = ready("limoe"), pairs()
    _, out = model.training_loss(images, ids, mask)
    (record,) = out.routing
    assert record.modality_load.sum(-1).tolist() == [PAIRS * PATCHES, int(mask.sum())]
    assert torch.equal(record.modality_load.sum(0), record.load)
    assert set(out.losses) >= {"text_local", "text_global", "image_global"}


def test_pairs_are_learned() -> None:
    torch.manual_seed(0)
    model, batch = imported(TOWERS["limoe"]).Model().train(), pairs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        loss, _ = model.training_loss(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = model.eval().similarity(*batch)
    assert torch.equal(found.argmax(0), torch.arange(PAIRS))
    assert torch.equal(found.argmax(1), torch.arange(PAIRS))


def test_routing_is_told_of_the_tokens_of_both_sides() -> None:
    (account,) = accounts(moegen.load(TOWERS["limoe"]).spec, 2, LENGTH)
    text = " ".join(sentence for part in account.parts for sentence in part.sentences)
    assert f"the {2 * (PATCHES + LENGTH)} tokens of the batch" in text
    assert "decod" not in text


def test_texts_are_no_longer_than_there_are_places() -> None:
    with pytest.raises(MoegenError, match="a text has at most 12 tokens, not 13"):
        moegen.plan(TOWERS["dense"], sequence=13)
    plan = moegen.plan(TOWERS["dense"], batch=2)
    assert plan.spec.model.workload(2, 12) == "2 pairs of 16 patches and 12 tokens of text"
