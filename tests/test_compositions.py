"""What holds for every composition of a router's parts, whichever they are."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from compositions import EXPERTS, layer, mixtures, package, planned, run, showing
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moegen.graph.execute import Executable, tensors

few = settings(
    max_examples=max(12, int(os.environ.get("MOEGEN_COMPOSITIONS", "32")) // 2),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def tokens(seed: int = 3, batch: int = 2, length: int = 6) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, EXPERTS, generator=chance, dtype=torch.float64)


def kind(moe: dict[str, Any]) -> str:
    return str(moe["router"]["select"]["kind"])


def chooses(moe: dict[str, Any]) -> bool:
    return kind(moe) not in ("soft", "expert_choice")


def alone(moe: dict[str, Any]) -> bool:
    """Whether a token's experts do not depend on other tokens."""
    return chooses(moe) and kind(moe) != "balanced"


def plain(moe: dict[str, Any]) -> bool:
    """Whether nothing is refused."""
    return moe["capacity"] is None


@few
@given(mixtures())
def test_weights_are_not_negative_and_sum_as_stated(moe: dict[str, Any]) -> None:
    made = showing(moe).train()
    weights, _ = run(made, moe, tokens())
    assert (weights >= 0).all()
    gate = moe["router"]["gate"]
    total = weights.sum(-1)
    scale = gate.get("scale", 1.0)
    normalize = gate.get("normalize", "none")
    refusing = moe["capacity"] or "second" in moe["router"]["select"]
    if normalize in ("sum", "softmax_over_kept") and chooses(moe) and "power" not in gate:
        assert (total <= scale + 1e-9).all()
        if not refusing or gate.get("after_drop"):
            some = (weights > 0).any(-1)
            assert torch.allclose(total[some], torch.full_like(total[some], scale))
    if normalize == "none" and moe["router"]["affinity"] == "softmax":
        assert (total <= 1 + 1e-9).all()
    if kind(moe) == "all" or kind(moe) == "soft":
        assert (weights > 0).all() or moe["router"]["restrict"]


@few
@given(mixtures(lambda moe: moe["capacity"] is not None), st.booleans())
def test_no_expert_takes_more_than_its_capacity(moe: dict[str, Any], training: bool) -> None:
    made = showing(moe).train(training)
    weights, record = run(made, moe, tokens())
    capacity, group = moe["capacity"], moe["group"]
    size = {"batch": 12, "sequence": 6}.get(group, group)
    k = moe["router"]["select"].get("k", 1)
    per = k if capacity.get("convention") == "per_choice" else 1
    slots = int(capacity.get("factor", 1) * per * size / EXPERTS)
    slots = capacity.get("slots") or max(slots, capacity.get("minimum", 0))
    taken = (weights > 0).flatten(0, 1)
    for start in range(0, 12, size):
        assert (taken[start : start + size].sum(0) <= slots).all()
    chosen = int(record.load.sum())
    assert int(taken.sum()) == round(float((1 - record.dropped) * chosen))


@few
@given(
    mixtures(lambda moe: plain(moe) and not (moe["router"]["restrict"] or moe["router"]["noise"]))
)
def test_permuting_experts_permutes_nothing_in_the_output(moe: dict[str, Any]) -> None:
    made = layer(moe).eval()
    other = copy.deepcopy(made)
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            per_expert = name not in ("temperature", "projection", "task_embedding")
            if per_expert:
                parameter.copy_(parameter[order])
    first, record = run(made, moe, tokens())
    second, again = run(other, moe, tokens())
    assert torch.allclose(first, second)
    assert torch.equal(record.load[order], again.load)
    for name, value in record.losses.items():
        assert torch.allclose(value, again.losses[name])


@few
@given(mixtures(lambda moe: plain(moe) and alone(moe) and moe["group"] == "batch"))
def test_a_batch_twice_gives_everything_twice(moe: dict[str, Any]) -> None:
    made = layer(moe).eval()
    x = tokens()
    once, record = run(made, moe, x)
    twice, again = run(made, moe, torch.cat((x, x)))
    assert torch.allclose(torch.cat((once, once)), twice)
    assert torch.equal(2 * record.load, again.load)
    for name, value in record.losses.items():
        assert torch.allclose(value, again.losses[name])
    assert torch.allclose(record.entropy, again.entropy)


@few
@given(mixtures(), st.booleans())
def test_padding_counts_for_nothing(moe: dict[str, Any], training: bool) -> None:
    """Whatever stands at padding: outputs of real tokens, loads and losses are the same."""
    made = layer(moe).train(training)
    x = tokens()
    valid = (torch.arange(6) < torch.tensor([[6], [3]])).flatten()
    other = x.clone()
    other.view(-1, EXPERTS)[~valid] = 7.0
    torch.manual_seed(1)
    one, record = run(made, moe, x, valid)
    torch.manual_seed(1)
    two, again = run(made, moe, other, valid)
    assert torch.allclose(one.flatten(0, 1)[valid], two.flatten(0, 1)[valid])
    if kind(moe) != "soft":
        real = int(valid.sum())
        assert int(record.load.sum()) <= real * EXPERTS
    assert torch.equal(record.load, again.load)
    for name, value in record.losses.items():
        assert torch.allclose(value, again.losses[name])


@few
@given(mixtures(lambda moe: plain(moe) and kind(moe) == "top_k"))
def test_capacity_for_all_is_no_capacity(moe: dict[str, Any]) -> None:
    roomy = {**moe, "capacity": {"slots": 12}}
    made, other = layer(moe), layer(roomy)
    other.load_state_dict(made.state_dict())
    for training in (True, False):
        torch.manual_seed(2)
        one, _ = run(made.train(training), moe, tokens())
        torch.manual_seed(2)
        two, again = run(other.train(training), roomy, tokens())
        assert torch.equal(one, two)
        assert float(again.dropped) == 0


@few
@given(mixtures())
def test_evaluation_is_deterministic(moe: dict[str, Any]) -> None:
    select = moe["router"]["select"]
    made = layer(moe).eval()
    assume(not isinstance(select.get("second"), dict) or select["second"]["policy"] != "random")
    one, _ = run(made, moe, tokens())
    two, _ = run(made, moe, tokens())
    assert torch.equal(one, two)


@few
@given(mixtures(), st.sampled_from([1.0, 1e4]))
def test_gradients_are_finite_whatever_the_logits(moe: dict[str, Any], size: float) -> None:
    made = layer(moe).train()
    x = (tokens() * size).requires_grad_()
    out, record = run(made, moe, x)
    total = out.square().mean() / size**2 + sum(record.losses.values())
    total.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for name, parameter in made.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@few
@given(mixtures(lambda moe: plain(moe) and alone(moe) and moe["router"]["input"] != "sentence"))
def test_nan_stays_with_its_token(moe: dict[str, Any]) -> None:
    made = layer(moe).eval()
    x = tokens()
    broken = x.clone()
    broken[0, 2] = torch.nan
    one, _ = run(made, moe, x)
    two, _ = run(made, moe, broken)
    others = torch.ones(2, 6, dtype=torch.bool)
    others[0, 2] = False
    assert torch.allclose(one[others], two[others])


@few
@given(mixtures(), st.booleans())
def test_what_is_emitted_is_the_graph_and_what_is_estimated(
    moe: dict[str, Any], training: bool
) -> None:
    plan, model = planned(moe), package(moe).Model()
    graph = Executable(plan.root)
    graph.load_state_dict(model.state_dict())
    graph.train(training)
    model.train(training)
    ids = torch.randint(0, 17, (2, 6), generator=torch.Generator().manual_seed(0))
    names = plan.spec.model.given()
    more = [torch.tensor([0, 1]) for _ in names]
    torch.manual_seed(4)
    one = model(ids, None, **dict(zip(names, more, strict=True)))
    torch.manual_seed(4)
    two = graph(ids, None, *more)
    for a, b in zip(tensors(one), tensors(two), strict=True):
        assert torch.equal(a, b)
    counted = sum(count for count, _, _ in plan.root.totals().values())
    assert counted == model.num_parameters()


@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", ["sum", "softmax_over_kept"])
def test_one_expert_is_a_dense_layer(affinity: str, normalize: str) -> None:
    if affinity == "sigmoid" and normalize != "sum":
        pytest.skip("softmax_over_kept is for softmax scores")
    moe = {
        "experts": {"count": 1, "width": 8, "bias": True, "activation": "relu"},
        "router": {"affinity": affinity, "select": 1, "gate": normalize},
    }
    made, x = layer(moe), tokens()
    out, record = run(made, moe, x)
    dense = torch.relu(x @ made.up[0].T + made.up_bias[0]) @ made.down[0].T + made.down_bias[0]
    assert torch.allclose(out, dense)
    assert record.load.tolist() == [12]


@pytest.mark.parametrize("select", [{"kind": "top_k", "k": EXPERTS}, {"kind": "all"}])
def test_all_experts_are_a_weighted_sum(select: dict[str, Any]) -> None:
    moe = {
        "experts": {"count": EXPERTS, "width": 8, "bias": True, "activation": "relu"},
        "router": {"select": select},
    }
    made, x = layer(moe), tokens()
    out, _ = run(made, moe, x)
    scores = (x @ made.router.T).softmax(-1)
    hidden = torch.relu(torch.einsum("bsd,ewd->bsew", x, made.up) + made.up_bias)
    each = torch.einsum("bsew,edw->bsed", hidden, made.down) + made.down_bias
    assert torch.allclose(out, (scores.unsqueeze(-1) * each).sum(2))
