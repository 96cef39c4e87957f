"""Worked cases of DeepSeek's mixtures (reference B19 to B21)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from worked_numbers import Case, Layer, gates, linear_experts, same, worked


def limited(case: Case, by: str, **router: Any) -> dict[str, Any]:
    """A router that chooses among the best groups of a case."""
    groups = case.inputs["groups"]
    assert groups == torch.arange(8).view(len(groups), -1).tolist()
    keep = case.params.get("M", case.params.get("topk_groups"))
    restrict = {"kind": "groups", "groups": len(groups), "keep": keep, "by": by}
    return {"restrict": restrict, "select": case.params["K"], **router}


def chosen_groups(experts: Tensor) -> list[int]:
    """Groups of two that hold chosen experts, lowest first."""
    return sorted(set((experts // 2).tolist()))


@worked("deepseek-v2-device-limited")
def test_experts_of_the_best_devices(case: Case) -> None:
    scale = case.params["route_scale"]
    logits = case["affinity"].log().unsqueeze(0)
    layer = gates(limited(case, "max", gate={"scale": scale}), 8)
    weights = layer.run(logits)[0]
    best, experts = (call.result[0] for call in layer.calls["top_k"])
    case.holds(experts=experts, gates_scale16=weights[experts])
    case.holds(group_scores=layer.calls["top_k"][0].args[0][0], groups_selected=best)
    free = gates({"select": case.params["K"]}, 8)
    free.run(logits)
    case.holds(unrestricted=free.result("top_k")[0])


V3 = {"affinity": "sigmoid", "balance_bias": 0.001}


@worked("deepseek-v3-router")
def test_router_of_v3(case: Case) -> None:
    gate = {"normalize": "sum", "scale": case.params["route_scale"]}
    logits = case["logits"].unsqueeze(0)
    layer = gates(limited(case, "top2_sum", gate=gate, **V3), 8)
    weights = layer.set(balance_bias=case["bias"]).run(logits)[0]
    best, experts = (call.result[0] for call in layer.calls["top_k"])
    case.holds(groups_selected=sorted(best.tolist()), experts=experts, gates=weights[experts])
    case.holds(sigmoid=layer.routing.probability)
    free = gates({"select": case.params["K"], **V3}, 8)
    free.run(logits)
    case.holds(unbiased_topk=free.result("top_k")[0])
    case.holds(group_scores=layer.calls["top_k"][0].args[0][0])
    free.set(balance_bias=case["bias"]).run(logits)
    case.holds(biased=free.calls["top_k"][0].args[0][0])


HF = "transformers fills other groups with zeros, which negative scores of chosen ones fall below"


@worked(
    "deepseek-v3-mask-zero-vs-minus-inf",
    zero_fill_scores=HF,
    zero_fill_first=HF,
    zero_fill_second_is_outside_selected_group=HF,
)
def test_other_groups_are_never_chosen(case: Case) -> None:
    layer = gates(limited(case, "top2_sum", **V3), 8)
    layer.set(balance_bias=case["bias"]).run(case["logits"].unsqueeze(0))
    best, experts = (call.result[0] for call in layer.calls["top_k"])
    case.holds(groups_selected=best, experts_minus_inf=experts)
    free = gates({"select": 2, **V3}, 8).set(balance_bias=case["bias"])
    free.run(case["logits"].unsqueeze(0))
    case.holds(biased=free.calls["top_k"][0].args[0][0])


@worked("deepseek-v3-bias-update")
def test_the_bias_moves_towards_even_load(case: Case) -> None:
    layer = gates({"select": 2, **V3, "balance_bias": case.params["gamma"]}, 8)
    load = case["load"]
    layer.set(balance_bias=case["bias"]).net.update_balance(load)
    case.holds(mean=load.double().mean(), new_bias=layer.net.balance_bias)


@worked("deepseek-v3-sequence-loss")
def test_balance_of_a_sequence(case: Case) -> None:
    k, alpha = case.params["K"], case.params["alpha"]
    router = {"affinity": "sigmoid", "select": k}
    held = {"experts": {"count": 8, "width": 1}, "losses": {"sequence_balance": alpha}}
    layer = Layer({**held, "router": router}, 2).set(router=case["centroids"])
    layer.run(case["u"])
    loss, experts = layer.routing.losses["sequence_balance"], layer.result("top_k")
    case.holds(loss=loss, weighted=loss * alpha, topk=experts)
    case.holds(sigmoid=layer.calls["sequence_balance_loss"][0].args[0])
    case.holds(f=layer.routing.load * (8 / (k * len(experts))))
    # All experts' gates divided by their sum are the scores that P is the mean of.
    every = gates({"affinity": "sigmoid", "select": "all", "gate": "sum"}, 8)
    normalised = every.run(case["u"] @ case["centroids"].t())
    case.holds(normalised=normalised, P=normalised.mean(0))


@worked("deepseek-seq-vs-batch-aux")
def test_balance_by_sequence_or_by_batch(case: Case) -> None:
    sequences = torch.stack((case["affinity_seq0"], case["affinity_seq1"])).log()
    losses = {"sequence_balance": 1.0, "balance": 1.0}
    layer = gates({"select": case.params["K"]}, 4, losses=losses)
    layer.run(sequences)
    found = layer.routing.losses
    case.holds(seq_aux_mean=found["sequence_balance"], batch_level=found["balance"])
    each = []
    for sequence in sequences:
        layer.run(sequence)
        each.append(layer.routing.losses["sequence_balance"])
    case.holds(per_sequence=torch.stack(each))


@worked("deepseek-balance-losses")
def test_balance_of_experts_devices_and_communication(case: Case) -> None:
    devices, k, limit = len(case.inputs["groups"]), case.params["K"], case.params["M"]
    losses = {
        "balance": 1.0,
        "device_balance": {"weight": 1.0, "devices": devices},
        "communication_balance": {"weight": 1.0, "devices": devices, "limit": limit},
    }
    layer = gates({"select": k}, 8, losses=losses)
    layer.run(case["affinity"].log())
    assert layer.result("top_k").tolist() == case.inputs["topk"]
    found = layer.routing.losses
    case.holds(expert_loss=found["balance"], device_loss=found["device_balance"])
    case.holds(comm_loss=found["communication_balance"])
    mean = layer.routing.probability
    f = layer.result("choice_fractions") * 8
    case.holds(f=f, P=mean, f_comm=layer.result("communication_fractions"))
    case.holds(f_dev=f.view(devices, -1).mean(1), P_dev=mean.view(devices, -1).sum(1))


@worked("deepseek-v2-device-token-drop")
def test_devices_drop_the_choices_of_least_affinity(case: Case) -> None:
    tokens, k, devices = (case.params[name] for name in "TKD")
    table = torch.full((tokens, 4), -1e4, dtype=torch.float64)
    assignments = case.inputs["assignments_token_expert_affinity"]
    for token, expert, affinity in assignments:
        table[token, expert] = torch.tensor(affinity, dtype=torch.float64).logit()
    capacity = {"factor": 1.0, "devices": devices, "priority": "weight"}
    layer = gates({"affinity": "sigmoid", "select": k}, 4, capacity=capacity)
    layer.run(table)
    assert layer.calls["refuse"][0].args[2] == case.want("budget_per_device")
    per_device = 4 // devices
    assert case.inputs["expert_to_device"] == [e // per_device for e in range(4)]
    kept = layer.kept()
    taken = [i for i, (t, e, _) in enumerate(assignments) if e in kept[t]]
    case.holds(kept=taken, dropped=sorted(set(range(len(assignments))) - set(taken)))


@worked("deepseekmoe-layer")
def test_shared_and_routed_experts(case: Case) -> None:
    moe = {
        "experts": {"count": 8, "width": 4, "activation": "relu"},
        "shared": case.params["K_shared"],
        "router": {"select": case.params["K_routed"]},
        "losses": {"importance": 1.0},
    }
    eye = torch.eye(2, dtype=torch.float64)
    layer = Layer(moe, 2).set(router=case["centroids"])
    scale = 0.1 * torch.arange(1, 9, dtype=torch.float64)
    linear_experts(layer, scale.view(8, 1, 1) * eye)
    signs = torch.cat((eye, -eye))
    with torch.no_grad():
        layer.net.shared.up.copy_(signs)
        layer.net.shared.down.copy_(0.5 * signs.t())
    u = case["u"]
    out = layer.run(u)
    case.holds(affinity=layer.calls["masked_mean"][0].args[0], topk=layer.result("top_k"))
    case.holds(gates=layer.result("dense_gates"), routed_output=layer.result("combine"))
    case.holds(output=u + out)


def test_nothing_is_dropped_on_devices_in_evaluation() -> None:
    capacity = {"factor": 1.0, "eval_factor": "unlimited", "devices": 2, "priority": "weight"}
    layer = gates({"affinity": "sigmoid", "select": 2}, 4, capacity=capacity)
    layer.run(torch.zeros(8, 4, dtype=torch.float64), training=False)
    same(layer.routing.dropped, 0.0)
