"""Worked cases of scores, affinities and gates (reference B1 to B5, B22, B24)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from worked_numbers import Case, Draws, Layer, gates, same, tensor, worked

SWITCH = {"select": 1}
TOP2 = {"select": 2}
SHARES = {"select": 2, "gate": "sum"}
OVER_KEPT = {"select": 2, "gate": "softmax_over_kept"}


def one(row: Tensor) -> Tensor:
    """A single token's logits as [1, E]."""
    return row.unsqueeze(0)


@worked("gate-order-top2")
def test_three_orders_of_gates(case: Case) -> None:
    logits = one(case["logits"])
    raw, shares, kept = (gates(r, 4) for r in (TOP2, SHARES, OVER_KEPT))
    case.holds(softmax_then_topk=raw.run(logits)[0])
    case.holds(softmax=raw.routing.probability, topk_indices=raw.result("top_k")[0])
    after, over = shares.run(logits)[0], kept.run(logits)[0]
    case.holds(softmax_then_topk_then_renormalise=after, topk_then_softmax=over)
    case.holds(max_abs_difference_last_two=(after - over).abs().max())


@worked("gate-order-top1")
def test_with_one_choice_the_softmax_over_it_is_one(case: Case) -> None:
    logits = one(case["logits"])
    raw, kept = gates(SWITCH, 4), gates({"select": 1, "gate": "softmax_over_kept"}, 4)
    expert = case.want("expert")
    same(raw.run(logits)[0, expert], case.want("switch_gate"))
    assert raw.result("top_k").item() == expert
    same(kept.run(logits)[0, expert], case.want("topk_then_softmax_gate"))


@worked("gate-tie-break")
def test_ties_go_to_the_lowest_expert(case: Case) -> None:
    logits = one(case["logits"])
    first, both = gates(SWITCH, 4), gates(TOP2, 4)
    first.run(logits)
    both.run(logits)
    case.holds(top1=first.result("top_k").item(), top2=both.result("top_k")[0])


@worked("gate-sigmoid")
def test_sigmoid_gates(case: Case) -> None:
    logits = one(case["logits"])
    raw = gates({"affinity": "sigmoid", **TOP2}, 4)
    shares = gates({"affinity": "sigmoid", **SHARES}, 4)
    case.holds(gates_unnormalised=raw.run(logits)[0], gates_normalised=shares.run(logits)[0])
    case.holds(sigmoid=raw.routing.probability, topk_indices=raw.result("top_k")[0])


def cosine(case: Case, affinity: str = "softmax", **score: object) -> Layer:
    """A cosine router of the case's token, which every expert is asked for."""
    every = {"select": "all", "score": {"kind": "cosine", "dim": 2, **score}, "affinity": affinity}
    layer = gates(every, 3)
    experts = "expert_embeddings" if "expert_embeddings" in case.inputs else "sim_matrix_columns"
    return layer.set(projection=case["projection"], router=case[experts])


@worked("xmoe-cosine-paper")
def test_cosine_router_of_the_paper(case: Case) -> None:
    x = one(case["hidden"])
    top = case.want("top1")
    for affinity in ("softmax", "sigmoid"):
        layer = cosine(case, affinity).set(temperature=case["temperature"])
        weights = layer.run(x)[0]
        same(weights, case.want(f"{affinity}_gate"))
        best = gates({**TOP1_COSINE, "affinity": affinity}, 3)
        best.set(projection=case["projection"], router=case["expert_embeddings"])
        chosen = best.set(temperature=case["temperature"]).run(x)[0]
        assert best.result("top_k").item() == top
        same(chosen[top], case.want(f"combine_weight_{affinity}"))
        same(chosen.sum(), chosen[top].item())
    experts, token = layer.result("unit", 0), layer.calls["unit"][1]
    case.holds(projected=token.args[0][0], cosine=(token.result @ experts.t())[0])


TOP1_COSINE = {"select": 1, "score": {"kind": "cosine", "dim": 2}}


@worked(
    "xmoe-torchscale-variant",
    expert_embeddings_after_inplace_rescale="torchscale writes to its weights before each forward "
    "pass, which changes no logit; emitted code does not",
)
def test_cosine_router_of_torchscale(case: Case) -> None:
    layer = cosine(case, normalize="experts", temperature="none")
    probabilities = layer.run(one(case["hidden"]))[0]
    case.holds(probs=probabilities)
    logits = layer.net.projection @ case["hidden"] @ layer.result("unit").t()
    case.holds(logits=logits)


@worked("gmoe-tutel-cosine")
def test_cosine_router_of_gmoe(case: Case) -> None:
    start = case.params["init_t"]
    layer = cosine(case, bias=True, temperature="exp", start=start)
    same(layer.net.temperature[0], case.inputs["t"], "as the parameter starts")
    same(math.log(100), case.params["clamp_max"])
    layer.set(projection_bias=case["projection_bias"], temperature=case["t"])
    case.holds(probs=layer.run(one(case["hidden"]))[0])
    experts, token = layer.result("unit", 0), layer.calls["unit"][1]
    cosines = (token.result @ experts.t())[0]
    case.holds(projected=token.args[0][0], cosine=cosines)
    # A logit is known up to a constant from its softmax; the cosines tell the constant.
    log = layer.routing.probability.log()
    scale = (log[2] - log[0]) / (cosines[2] - cosines[0])
    case.holds(scale=scale, logits=cosines * scale)


@worked("gmoe-tutel-cosine-clamp")
def test_cosine_temperature_is_bounded(case: Case) -> None:
    layer = gates({"select": "all", "score": {"kind": "cosine", "temperature": "exp"}}, 2)
    layer.set(router=torch.eye(2), temperature=case["t"])
    log = layer.run(tensor([[0.6, 0.8]]))[0].log()
    case.holds(scale=(log[1] - log[0]) / 0.2)


def density(case: Case, kind: str, scales: str) -> Layer:
    layer = Layer(
        {
            "experts": {"count": 3, "width": 1, "activation": "relu", "bias": True},
            "router": {"select": "all", "score": kind},
            "losses": {"z": 1.0},
        },
        2,
    )
    layer.set(up=0.0, up_bias=0.0, down=0.0, down_bias=0.0, router=case["means"])
    return layer.set(log_scale=case[scales].log(), log_prior=case["priors"].log())


@worked("gate-gaussian-xu1994")
def test_gaussian_gate(case: Case) -> None:
    layer = density(case, "gaussian", "sigmas")
    layer.run(one(case["x"]))
    constant = math.log(2 * math.pi) * len(case.inputs["x"]) / 2  # the same for all experts
    case.holds(gate=layer.routing.probability)
    case.holds(log_joint=layer.calls["z_loss"][0].args[0][0] - constant)


@worked("gate-laplace")
def test_laplace_gate(case: Case) -> None:
    layer = density(case, "laplace", "scales")
    layer.run(one(case["x"]))
    case.holds(gate=layer.routing.probability, logits=layer.calls["z_loss"][0].args[0][0])


@worked("gating-logit-cap")
def test_logits_are_bounded(case: Case) -> None:
    score = {"score": {"cap": case.params["cap"]}, "select": "all"}
    layer = gates(score, 3, losses={"z": 1.0})
    layer.run(one(case["logits"]))
    case.holds(capped=layer.calls["z_loss"][0].args[0][0])


@worked("switch-input-jitter")
def test_jitter_is_seen_by_the_router_alone(case: Case) -> None:
    x = one(case["x"])
    moe = {
        "experts": {"count": 1, "width": 6, "activation": "relu"},
        "router": {"select": 1, "noise": case.params["eps"], "gate": "constant"},
    }
    layer = Layer(moe, 3)
    eye = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    layer.set(up=torch.cat((eye, -eye), 1), down=torch.cat((eye, -eye), 2))
    with Draws(uniform_=one(case["uniform01"])):
        out = layer.run(x)
    jittered = layer.result("jitter")
    case.holds(jittered=jittered[0], factors=(jittered / x)[0])
    assert torch.equal(out, x)
    assert torch.equal(layer.run(x, training=False), x)
    assert torch.equal(layer.result("jitter"), x)


@worked("mixtral-gate")
def test_mixtral_gate(case: Case) -> None:
    layer = gates(OVER_KEPT, 8)
    weights = layer.run(one(case["logits"]))[0]
    experts = layer.result("top_k")[0]
    case.holds(experts=experts, weights=weights[experts])


@worked("megablocks-weight-normalisation")
def test_weights_divided_by_their_norm(case: Case) -> None:
    weights = case.inputs["weights"]
    logits = one(tensor([*weights, 1 - sum(weights)]).log())
    for p in (1, 2):
        gate = {"normalize": "sum", "power": float(p)}
        layer = gates({"select": 2, "gate": gate}, 3)
        same(layer.run(logits)[0, :2], case.want(f"p{p}"))


@worked("switch-router-gradient")
def test_all_logits_receive_gradient_from_a_raw_gate(case: Case) -> None:
    layer = gates(SWITCH, 3)
    layer.set(down_bias=case["expert_output"])
    x = one(case["logits"]).requires_grad_()
    layer.run(x)[0, 0].backward()
    case.holds(selected=layer.result("top_k").item(), grad=x.grad[0])


@worked("mixtral-router-gradient")
def test_unchosen_logits_receive_none_from_a_softmax_over_kept(case: Case) -> None:
    layer = gates(OVER_KEPT, 3)
    outputs = torch.cat((case["expert_outputs"], torch.full((1,), 7.0))).unsqueeze(1)
    layer.set(down_bias=outputs.expand(3, 3))
    x = one(case["logits"]).requires_grad_()
    layer.run(x)[0, 0].backward()
    case.holds(grad=x.grad[0])
    assert x.grad[0, 2] == 0
    case.holds(weights=gates(OVER_KEPT, 3).run(one(case["logits"]))[0, :2])


@worked("selective-precision-bf16-roundoff")
def test_a_router_in_16_bits_rounds_its_logits(case: Case) -> None:
    logit = case.inputs["logit"]
    seen: dict[str, list[float]] = {}
    for router in ("bf16", "fp32"):
        precision = {"parameters": "fp32", "router": router}
        layer = gates({"select": 1}, 2, losses={"z": 1.0}, precision=precision)
        for near in (logit, logit - 1e-3, logit + 1e-3):
            layer.run(torch.tensor([[near, 0.0]]))
            logits = layer.calls["z_loss"][0].args[0]
            seen.setdefault(router, []).append(logits[0, 0].item())
    assert seen["fp32"][0] == logit
    case.holds(bf16_neighbours=seen["bf16"][1:])
    case.holds(relative_error_exp=math.exp(seen["bf16"][2]) / math.exp(seen["fp32"][0]) - 1)
