"""Worked cases of capacity: how many, who comes first, who is refused (reference 2.5, 2.6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from worked_numbers import Case, Layer, gates, one_hot, relu_experts, same, worked

FIRST = {"balance": {"weight": 1.0, "count": "first"}}
SWITCH = {"select": 1}


def by_expert(layer: Layer, experts: int) -> list[list[int]]:
    """The tokens in each expert's buffer, by slot."""
    kept, slots = layer.kept()[:, 0], layer.slots()[:, 0]
    tokens = torch.arange(len(kept))
    return [tokens[kept == e][slots[kept == e].argsort()].tolist() for e in range(experts)]


def refused(layer: Layer, experts: int = 4) -> list[int]:
    """Tokens without a place, of one choice each."""
    return (layer.kept()[:, 0] == experts).nonzero().flatten().tolist()  # type: ignore[no-any-return]


def switched(case: Case, capacity: Any, **moe: Any) -> tuple[Layer, Tensor]:
    """A Switch layer over the case's logits, and its combine weights."""
    logits = case["logits"]
    layer = gates(SWITCH, logits.shape[1], capacity=capacity, losses=FIRST, **moe)
    return layer, layer.run(logits)


def holds_switch(case: Case, layer: Layer, out: Tensor) -> None:
    chosen = layer.result("top_k")
    slots = layer.slots()[:, 0]
    gate = layer.calls["combine"][0].args[2][:, 0]
    case.holds(probs=layer.calls["masked_mean"][0].args[0], expert_index=chosen[:, 0])
    case.holds(gate=gate, slot=slots, combine=out, dropped=refused(layer))
    case.holds(dispatch_order=by_expert(layer, 4))
    same(layer.routing.dropped, len(refused(layer)) / len(out))
    assert layer.calls["refuse"][0].args[2] == case.params["capacity"]


def mesh_tensorflow(case: Case) -> dict[str, Any]:
    """Capacity by the case's factor and minimum."""
    return {"factor": case.params["capacity_factor"], "minimum": case.params["min_capacity"]}


@worked("switch-route-cap2")
def test_switch_routing(case: Case) -> None:
    layer, out = switched(case, mesh_tensorflow(case))
    holds_switch(case, layer, out)
    fraction, mean = layer.calls["balance_loss"][0].args
    case.holds(aux={"f": fraction, "P": mean, "loss": layer.routing.losses["balance"]})


@worked("switch-route-mincap4")
def test_switch_routing_with_a_minimum(case: Case) -> None:
    holds_switch(case, *switched(case, mesh_tensorflow(case)))


def by_id(case: Case, **capacity: Any) -> tuple[Layer, Tensor]:
    """Relu experts on the case's x, routed by logits that are looked up for each token."""
    x = case["x"]
    moe = {
        "experts": {"count": 2, "width": 2, "activation": "relu"},
        "router": {"input": {"kind": "id", "id": "place", "count": 3}, "select": 1},
        "capacity": {"slots": case.params["capacity"], **capacity},
    }
    layer = relu_experts(Layer(moe, 2), case["expert_weights"])
    layer.set(place_embedding=case["logits"], router=torch.eye(2))
    return layer, layer.run(x, place=torch.arange(3))


@worked("switch-forward-residual")
def test_refused_tokens_have_the_residual_alone(case: Case) -> None:
    layer, out = by_id(case)
    case.holds(moe_output=out, with_residual=case["x"] + out, slot=layer.slots()[:, 0])


@worked("switch-hf-old-dropped-token")
def test_refused_tokens_may_add_themselves(case: Case) -> None:
    case.holds(moe_output=by_id(case, overflow="input")[1])


HF = "transformers' Switch counts refused tokens for expert 0, a fault of it"


@worked("switch-hf-aux-after-drop", hf_quirk=HF, index_used=HF)
def test_balance_counts_refused_tokens(case: Case) -> None:
    layer, _ = switched(case, {"slots": case.params["capacity"]})
    case.holds(paper=layer.routing.losses["balance"])


@worked("switch-hf-aux-after-drop-2", hf_quirk=HF, index_used_hf=HF)
def test_balance_counts_refused_tokens_for_their_experts(case: Case) -> None:
    layer, _ = switched(case, {"slots": case.params["capacity"]})
    case.holds(paper=layer.routing.losses["balance"])
    case.holds(index_precapacity=layer.result("top_k")[:, 0])


@worked("switch-ntlb")
def test_no_token_left_behind(case: Case) -> None:
    passes, slots = case.params["k"], case.params["capacity"]
    capacity = {"slots": slots, "overflow": "next", "passes": passes}
    layer, out = switched(case, capacity)
    kept, order = layer.result("next_best")[:, 0], layer.result("top_k")
    case.holds(expert=kept, gate=out.gather(1, kept.unsqueeze(1))[:, 0])
    rank = (order == kept.unsqueeze(1)).int().argmax(1)
    case.holds(choice_rank=rank, slot=place_by_pass(kept, rank))


def place_by_pass(experts: Tensor, rank: Tensor) -> Tensor:
    """Slots of tokens [T] that an expert takes pass by pass, each in token order."""
    return torch.stack(
        [
            ((experts == e) & ((rank < r) | ((rank == r) & (torch.arange(len(rank)) < t)))).sum()
            for t, (e, r) in enumerate(zip(experts, rank, strict=True))
        ]
    )


@worked("switch-max-gating")
def test_the_most_probable_tokens_come_first(case: Case) -> None:
    capacity = {"slots": case.params["capacity"], "priority": "weight"}
    layer, out = switched(case, capacity)
    case.holds(combine=out, kept=by_expert(layer, 4))


@worked("svm-mixture-capacity-assignment")
def test_examples_go_to_the_best_expert_with_room(case: Case) -> None:
    logits = case["gater_outputs"]
    slots = len(logits) // 2 + case.params["c"]
    layer = gates(SWITCH, 2, capacity={"slots": slots, "overflow": "next", "passes": 2})
    layer.run(logits)
    kept = layer.result("next_best")[:, 0]
    case.holds(assignment=kept, counts=torch.bincount(kept, minlength=2))
    case.holds(capacity=layer.calls["next_best"][0].args[2])


def v_moe(case: Case, priority: str) -> tuple[Layer, dict[str, Any]]:
    """A V-MoE layer with raw gates, and what the cases expect of one."""
    logits = case["logits"]
    capacity = {"slots": case.params["capacity"], "priority": priority}
    layer = gates({"select": case.params["k"]}, logits.shape[1], capacity=capacity)
    out = layer.run(logits)
    given = layer.calls["position_in_expert"][0].options.get("priority")
    order = torch.arange(len(logits))
    order = order if given is None else given.sort(descending=True, stable=True).indices
    chosen, slots = layer.result("top_k"), layer.slots()
    found = {"expert_index": chosen, "slot": slots, "combine": out, "token_order": order}
    return layer, found


@worked("vmoe-vanilla-vs-bpr")
def test_batch_prioritized_routing(case: Case) -> None:
    vanilla, found = v_moe(case, "rank")
    case.holds(vanilla=found, dropped_vanilla=refused(vanilla, 2))
    bpr, found = v_moe(case, "confidence")
    case.holds(bpr=found, dropped_bpr=refused(bpr, 2))


@worked("vmoe-top2-cap3")
def test_two_raw_gates_in_token_order(case: Case) -> None:
    case.holds(**v_moe(case, "rank")[1])


@worked("vmoe-top2-cap3-bpr")
def test_two_raw_gates_by_confidence(case: Case) -> None:
    case.holds(**v_moe(case, "confidence")[1])


@worked("drop-towards-the-end")
def test_the_end_of_a_sequence_is_dropped(case: Case) -> None:
    logits = one_hot(case.inputs["expert_of_token"], 2)
    layer = gates(SWITCH, 2, capacity={"slots": case.inputs["capacity"]})
    layer.run(logits)
    dropped = refused(layer, 2)
    case.holds(dropped_positions=dropped, mean_position_dropped=sum(dropped) / len(dropped))
    case.holds(mean_position_all=sum(range(len(logits))) / len(logits))


@worked("group-wise-vs-global-capacity")
def test_groups_compete_apart(case: Case) -> None:
    logits = one_hot(case.inputs["expert_of_token"], 4)
    for name, group, slots in (
        ("two_groups", 4, case.params["capacity_per_group"]),
        ("one_group", 8, case.params["capacity_global"]),
    ):
        layer = gates(SWITCH, 4, capacity={"slots": slots}, group=group)
        layer.run(logits)
        same(refused(layer), case.want(f"{name}_dropped"))


@worked("eval-capacity-factor")
def test_a_higher_factor_in_evaluation_drops_less(case: Case) -> None:
    rows = []
    for row in case.want("rows"):
        capacity = {"factor": 0.5, "eval_factor": row["cf"]}
        layer = gates(SWITCH, 4, capacity=capacity)
        layer.run(case["logits"], training=False)
        dropped = len(refused(layer))
        rows.append({"cf": row["cf"], "capacity": room(layer), "dropped": dropped})
    same(rows, case.want("rows"))


def room(layer: Layer) -> int:
    """Slots of an expert in the last run."""
    return int(layer.calls["refuse"][-1].args[2])
