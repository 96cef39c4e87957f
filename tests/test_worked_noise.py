"""Worked cases of noisy routers, importance and load (reference B4, B6, B7, B11)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from worked_numbers import Case, Draws, Layer, gates, same, worked

NOISY = {"noise": "learned", "select": 2, "gate": "softmax_over_kept"}
BOTH = {"importance": 0.1, "load": 0.1}


def shazeer(case: Case, **changes: Any) -> Layer:
    """The noisy router of a case over four experts, which see tokens of width 2."""
    floor = case.params.get("noise_epsilon", 0.01)
    router = {**NOISY, "noise": {"kind": "learned", "floor": floor}}
    experts = {"count": 4, "width": 1, "activation": "relu", "bias": True}
    layer = Layer({"experts": experts, "router": router, "losses": BOTH}, 2, **changes)
    if "w_gate" in case.inputs:
        layer.set(router=case["w_gate"].t(), noise=case["w_noise"].t())
    return layer


def holds_shazeer(case: Case, layer: Layer) -> None:
    """What the router gave and what its losses are made of."""
    clean, noisy, _, k = layer.calls["top_k_probability"][0].args[:4]
    assert k == case.params["k"]
    if "cv2_load" in case.expected:
        losses = layer.routing.losses
        case.holds(clean_logits=clean, noisy_logits=noisy)
        case.holds(prob_in_topk=layer.result("top_k_probability"))
        case.holds(cv2_importance=losses["importance"], cv2_load=losses["load"])
        case.holds(loss_importance_w0p1=losses["importance"] * BOTH["importance"])
        case.holds(loss_load_w0p1=losses["load"] * BOTH["load"])
    importance, load = (call.result for call in layer.calls["sum_of_real"])
    case.holds(gates=layer.result("dense_gates"), importance=importance, load=load)


def train_shazeer(case: Case) -> None:
    layer = shazeer(case)
    with Draws(randn_like=case["standard_normal"]):
        layer.run(case["x"])
    case.holds(noise_std=layer.calls["gaussian_noise"][0].args[1])
    holds_shazeer(case, layer)


@worked("shazeer-noisy-topk-train")
def test_noisy_top_k_in_training(case: Case) -> None:
    train_shazeer(case)


@worked("shazeer-noisy-topk-train-paper")
def test_noisy_top_k_of_the_paper(case: Case) -> None:
    train_shazeer(case)


@worked("shazeer-noisy-topk-eval")
def test_noisy_top_k_in_evaluation(case: Case) -> None:
    layer = shazeer(case)
    layer.run(case["x"], training=False)
    noise = layer.calls["gaussian_noise"][0]
    case.holds(noise_std=noise.result - noise.args[0])
    holds_shazeer(case, layer)


@worked("shazeer-zero-init")
def test_a_router_that_starts_at_zero_selects_by_noise(case: Case) -> None:
    layer = shazeer(case, init={"router": {"kind": "zeros"}})
    with Draws(randn_like=case["standard_normal"]):
        layer.run(case["x"])
    expected = case.want("noise_std")
    for deviation in layer.calls["gaussian_noise"][0].args[1].flatten():
        same(deviation, expected)
    holds_shazeer(case, layer)


@worked("cv-squared-estimators")
def test_two_estimators_of_variation(case: Case) -> None:
    ops = shazeer(Case("shazeer-noisy-topk-eval")).ops
    case.holds(population=ops.cv_squared(case["values"]))
    case.holds(unbiased=ops.cv_squared(case["values"], True))


@worked("vmoe-importance-collapse")
def test_variation_of_a_collapse(case: Case) -> None:
    ops = shazeer(Case("shazeer-noisy-topk-eval")).ops
    case.holds(cv2=ops.cv_squared(case["importance"]))


def log_gates(gates: Tensor) -> Tensor:
    """Logits whose softmax these are; what is so low is 0 after it."""
    return gates.log().clamp(min=-1e4)


@worked("shazeer-hierarchical")
def test_mixtures_inside_experts(case: Case) -> None:
    outer, inner = case["g_primary"], case["g_secondary"]
    tokens = len(outer)
    dense = {"select": {"k": 2, "second": second_above(1e-12)}, "gate": "none"}
    nested = {"count": 2, "router": {"select": "all"}}
    experts = {"count": 2, "width": 1, "activation": "relu", "bias": True, "nested": nested}
    moe = {"experts": experts, "router": dense, "losses": {"importance": 1.0}}
    layer = Layer(moe, tokens)
    layer.set(up=0.0, up_bias=0.0, down=0.0, router=log_gates(outer).t())
    layer.set(down_bias=case["expert_outputs"].reshape(4, 1).expand(4, tokens))
    # Each token sees its own gates: it is a row of the identity.
    layer.set(inner_router=log_gates(inner).permute(1, 2, 0))
    out = layer.run(torch.eye(tokens, dtype=torch.float64))
    case.holds(output=out[:, 0], importance_H=layer.result("nested_importance"))
    case.holds(load_H=load_inside(case))


def second_above(threshold: float) -> dict[str, Any]:
    """Second choices that are made only if their gate is not zero."""
    policy = "threshold"
    return {"policy": policy, "eval_policy": policy, "threshold": threshold}


def load_inside(case: Case) -> Tensor:
    """The emitted op on rows that sum to the case's loads."""
    router = {"noise": "gaussian", "select": 1}
    nested = {"count": 2, "router": router}
    experts = {"count": 2, "width": 1, "nested": nested}
    ops = Layer({"experts": experts, "router": router, "losses": {"load": 1.0}}, 2).ops
    rows, loads = case.inputs["tokens_per_primary"], case["load_secondary"]
    each = [(load / n).expand(n, -1) for load, n in zip(loads, rows, strict=True)]
    ends = torch.tensor(rows).cumsum(0).int()
    valid = torch.ones(sum(rows), dtype=torch.bool)
    return ops.nested_load(case["load_primary"], torch.cat(each), ends, valid)  # type: ignore[no-any-return]


# The case's gates hold a tie, which a softmax of their logarithms would round away.
STRICT = {
    "affinity": "sigmoid",
    "select": {"kind": "expert_choice", "factor": 1.0},
    "gate": "sum",
}


@worked(
    "shazeer-strictly-balanced",
    threshold_mask="thresholds learned for inference are not in the language",
    threshold_loss="thresholds learned for inference are not in the language",
)
def test_strictly_balanced_gates(case: Case) -> None:
    chosen = case["softmax_gates"]
    layer = gates(STRICT, 3)
    weights = layer.run(chosen.logit())
    best = layer.result("best_tokens")
    taken = torch.zeros(3, len(chosen)).scatter(-1, best, 1.0).t()
    case.holds(m=best.shape[1], batchwise_mask=taken, gates=weights)


def v_moe(case: Case, **load: Any) -> Layer:
    """A router with noise of deviation 1 / E and losses of importance and load."""
    losses = {
        "importance": {"weight": 0.005, "of": "scores", **load.pop("importance", {})},
        "load": {"weight": 0.005, "threshold": "kth", **load},
    }
    layer = gates({"noise": "gaussian", "select": case.params["k"]}, 3, losses=losses)
    with Draws(randn_like=case["standard_normal"]):
        layer.run(case["logits"])
    return layer


@worked("vmoe-aux-losses")
def test_losses_of_v_moe(case: Case) -> None:
    layer = v_moe(case)
    losses = layer.routing.losses
    clean, noisy, deviation, k = layer.calls["top_k_probability"][0].args[:4]
    assert case.params["noise_std"] == "1/E"
    same(deviation, 1 / clean.shape[1])
    case.holds(noisy_logits=noisy, gates_noisy=layer.calls["masked_mean"][0].args[0])
    case.holds(threshold=noisy.sort(descending=True).values[:, k - 1])
    importance, load = (call.result for call in layer.calls["sum_of_real"])
    case.holds(importance=importance, importance_loss=losses["importance"])
    case.holds(prob=layer.result("top_k_probability"))
    case.holds(load_mean=load / len(noisy), load_loss=losses["load"])
    both = [losses["importance"], losses["load"]]
    case.holds(aux_half_half=sum(both) / 2)
    weighted = sum(w * loss for w, loss in zip(case.params["weights"], both, strict=True))
    case.holds(aux_config_weighted=weighted)


@worked("tutel-load-importance-quirk")
def test_losses_of_tutel(case: Case) -> None:
    assert case.params["gate_noise"] == 1.0
    layer = v_moe(case, of="scores", unbiased=True, importance={"unbiased": True})
    losses = layer.routing.losses
    importance, load = (call.result for call in layer.calls["sum_of_real"])
    case.holds(importance=importance, load=load)
    case.holds(l_imp=losses["importance"], l_load=losses["load"])
    case.holds(loss=(losses["importance"] + losses["load"]) / 2)
