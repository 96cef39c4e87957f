"""Worked cases of other ways to choose: by experts, softly, balanced, by id (B12 to B17)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from worked_numbers import Case, Layer, gates, relu_experts, same, worked


def choice(case: Case, factor: float, affinity: str, gate: str, **moe: Any) -> Layer:
    """Experts that choose tokens, run on the case's logits."""
    select = {"kind": "expert_choice", "factor": factor}
    layer = gates({"affinity": affinity, "select": select, "gate": gate}, 4, **moe)
    combined = layer.run(case["logits"])
    best = layer.result("best_tokens")
    case.holds(token_indices=best, combine=combined)
    case.holds(experts_per_token=torch.bincount(best.flatten(), minlength=len(combined)))
    return layer


@worked("expert-choice")
def test_experts_choose_tokens(case: Case) -> None:
    layer = choice(case, case.params["capacity_factor"], "softmax", "none")
    rows, tokens, weights, _ = layer.calls["combine_rows"][0].args
    assert len(rows) == len(tokens)
    best = layer.result("best_tokens")
    case.holds(capacity=best.shape[1], gates=weights.view(best.shape))


@worked("expert-choice-meshtf-variant")
def test_experts_choose_among_competing_tokens(case: Case) -> None:
    factor = case.params["capacity"] * 4 / len(case["logits"])
    losses = {"token_balance": 0.01}
    layer = choice(case, factor, "softmax_over_tokens", "count", losses=losses)
    case.holds(loss=layer.routing.losses["token_balance"])


def soft(case: Case, score: Any) -> tuple[Layer, Tensor]:
    """A soft layer of two experts with a slot each."""
    moe = {
        "experts": {"count": 2, "width": 2, "activation": "relu"},
        "router": {"score": score, "select": {"kind": "soft", "slots": 1}},
        "losses": {"z": 1.0},
    }
    layer = Layer(moe, 2).set(router=case["phi"].t())
    relu_experts(layer, case["expert_weights"])
    if "scale" in case.inputs:
        layer.set(temperature=case["scale"])
    return layer, layer.run(case["x"])


def holds_soft(case: Case, layer: Layer, out: Tensor) -> None:
    case.holds(logits=layer.calls["z_loss"][0].args[0], output=out)
    case.holds(dispatch=layer.result("softmax_over_tokens"))
    case.holds(combine=layer.calls["masked_mean"][0].args[0])
    case.holds(slots=layer.calls["grouped_linear"][0].args[0])
    case.holds(slot_outputs=layer.calls["grouped_linear"][1].result)


@worked("soft-moe-basic")
def test_soft_mixture(case: Case) -> None:
    holds_soft(case, *soft(case, "linear"))


@worked("soft-moe-normalised")
def test_soft_mixture_of_unit_vectors(case: Case) -> None:
    eps = case.params["eps"]
    score = {"kind": "cosine", "temperature": "scale", "start": 1.0, "eps": eps}
    holds_soft(case, *soft(case, score))


@worked("soft-moe-single-token")
def test_soft_mixture_of_one_token(case: Case) -> None:
    layer = gates({"select": {"kind": "soft", "slots": 1}}, 2)
    combined = layer.run(case["logits"])
    case.holds(combine=combined, dispatch=layer.result("softmax_over_tokens"))


BASE = {"affinity": "sigmoid", "select": {"kind": "balanced"}, "gate": {"blend": True}}


def balanced(case: Case) -> None:
    """Assignment by the case's affinities, in training and in evaluation."""
    affinity = case["affinity"]
    count = affinity.shape[1]
    layer = gates(BASE, count)
    layer.run(affinity)
    experts = layer.result("balanced_or_best")[:, 0]
    case.holds(train_assignment=experts)
    case.holds(total=affinity[range(len(affinity)), experts].sum())
    layer.run(affinity, training=False)
    case.holds(greedy_assignment=layer.result("balanced_or_best")[:, 0])


@worked(
    "base-balanced-assignment",
    auction_epsilon="a setting of fairseq's auction, whose end is near the best; ours is the best",
)
def test_balanced_assignment(case: Case) -> None:
    balanced(case)


@worked("base-balanced-assignment-3", number_of_optima="a property of the numbers, not of a layer")
def test_balanced_assignment_to_three(case: Case) -> None:
    balanced(case)


@worked("base-gated-residual")
def test_an_expert_is_blended_with_its_token(case: Case) -> None:
    h = case["h"]
    experts = {"count": 1, "width": 1, "activation": "relu", "bias": True, "residual": True}
    layer = Layer({"experts": experts, "router": BASE}, 2)
    # The feed-forward part of the residual sublayer gives the case's delta whatever it sees.
    layer.set(up=0.0, up_bias=0.0, down=0.0, down_bias=case["ffn_delta"])
    out = layer.set(router=case["centroid"]).run(h.unsqueeze(0))
    case.holds(output=out[0], alpha=layer.routing.probability[0])


@worked("hash-routing")
def test_experts_by_table(case: Case) -> None:
    count = case.params["num_experts"]
    capacity = {"slots": case.params["capacity"]}
    layer = gates({"score": "table", "select": 1}, count, capacity=capacity)
    layer.set(expert_of_id=case["hash_table"])
    ids = case["token_ids"]
    combined = layer.run(torch.zeros(len(ids), count, dtype=torch.float64), token=ids)
    case.holds(expert=layer.result("top_k")[:, 0], slot=layer.slots()[:, 0])
    weight = case.want("weight")
    for token, slot in enumerate(layer.slots()[:, 0]):
        same(combined[token].sum(), weight if slot >= 0 else 0.0)


@worked("hash-balanced-table")
def test_a_table_that_balances_frequencies(case: Case) -> None:
    count = case.params["num_experts"]
    layer = gates({"score": {"kind": "table", "by": "balanced"}, "select": 1}, count)
    table = layer.ops.balanced_table(case["frequency"], count)
    case.holds(table=table)
    load = torch.zeros(count, dtype=torch.int64).scatter_add_(0, table, case["frequency"])
    case.holds(bucket_load=load)


MASK = {"restrict": {"kind": "visible", "frequent": 4, "rare": 1}, "select": 1}


@worked("maskmoe-gate")
def test_ids_see_some_experts(case: Case) -> None:
    layer = gates(MASK, 4)
    masks = case.inputs["masks"]
    visible = torch.ones(8, 4, dtype=torch.bool)
    visible[: len(masks)] = torch.tensor(list(masks.values())).bool()
    layer.set(visible=visible)
    logits = case["logits"].unsqueeze(0)
    for index, name in enumerate(masks):
        combined = layer.run(logits, token=torch.tensor([index]))
        expert = layer.result("top_k").item()
        found = {"expert": expert, "probs": layer.routing.probability}
        same(found, case.want(name))
        same(combined[0, expert], found["probs"][expert].item())


@worked("maskmoe-frequency-split")
def test_frequent_ids_make_up_most_of_a_text(case: Case) -> None:
    frequent = gates(MASK, 4).ops.frequent_ids(case["frequency"], case.inputs["P"])
    case.holds(cls=["frequent" if each else "rare" for each in frequent])


@worked("sentence-moe-gating")
def test_sentences_are_routed_as_one(case: Case) -> None:
    # A sentence is a sequence here: two of them, and one of padding alone.
    tokens, segments = case["tokens"], case.inputs["segment_ids"]
    assert segments == [1, 1, 2, 2, 0]
    x = torch.cat((tokens, torch.zeros(1, 2))).view(3, 2, 2)
    valid = torch.tensor([*(s > 0 for s in segments), False])
    moe = {
        "experts": {"count": 3, "width": 1},
        "router": {"input": "sentence", "select": 2, "gate": "sum"},
        "losses": {"z": 1.0},
    }
    layer = Layer(moe, 2).set(router=case["gate"].t())
    layer.run(x, valid=valid)
    real = len(segments)
    case.holds(embeddings=layer.result("sequence_mean")[:real])
    case.holds(logits=layer.calls["z_loss"][0].args[0][:real])
    case.holds(top2=layer.result("top_k")[:real])


@worked("task-moe-gating")
def test_tasks_are_routed_by_their_ids(case: Case) -> None:
    table = case["task_embeddings"]
    moe = {
        "experts": {"count": 3, "width": 1},
        "router": {
            "input": {"kind": "id", "id": "task", "count": len(table)},
            "select": 2,
            "gate": "sum",
        },
        "losses": {"z": 1.0},
    }
    layer = Layer(moe, 2).set(router=case["gate"].t(), task_embedding=table)
    tasks = case["token_task"]
    layer.run(torch.randn(len(tasks), 2, dtype=torch.float64), task=tasks)
    case.holds(logits=layer.calls["z_loss"][0].args[0], top2=layer.result("top_k"))
    case.holds(gates=layer.calls["combine"][0].args[2])
