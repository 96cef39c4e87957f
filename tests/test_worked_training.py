"""Worked cases of training policies: what is frozen, masked, and scaled, in emitted code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from worked_numbers import Case, Layer, decoder, emitted, same, worked

# The parameters of the case by the names of ours; experts are one tensor.
OURS = {
    "embed.weight": "embedding",
    "enc.0.attn.q": "layers.0.attention.query",
    "enc.0.ln.scale": "layers.0.attention_norm",
    "enc.0.ffn.wi": "layers.0.ffn.up",
    "enc.1.attn.q": "layers.1.attention.query",
    "enc.1.moe.router.weight": "layers.1.moe.router",
    "enc.1.moe.experts.0.wi": "layers.1.moe.up",
    "enc.1.moe.experts.1.wi": "layers.1.moe.up",
    "lm_head.weight": "head",
}
POLICIES: dict[str, dict[str, Any]] = {
    "all": {"preset": "st-moe-finetune"},
    "freeze_gate": {"preset": "flan-moe-freeze-router"},
    "freeze_expert": {"preset": "flan-moe-freeze-experts"},
    "freeze_moe": {"preset": "flan-moe-freeze-moe"},
    "non_moe": {"preset": "st-moe-non-moe"},
    "moe_only": {"preset": "st-moe-moe-only"},
    "attention_only": {"preset": "st-moe-attention-only"},
    "ffn_only": {"preset": "st-moe-ffn-only"},
    "router_only": {"only": ["router"]},
}


def trained(train: dict[str, Any]) -> dict[str, bool]:
    """By name of a parameter, whether the emitted model of two layers trains it."""
    relu = {"activation": "relu", "width": 4}
    moe = {"experts": {"count": 2, **relu}, "placement": {"last": 1}, "capacity": 2.0}
    spec = decoder({**moe, "router": {"select": 1}}, 4, layers=2, ffn=relu, train=train)
    model = emitted(spec).Model()
    grouped = {id(p) for group in model.parameter_groups(1.0) for p in group["params"]}
    found = {name: p.requires_grad for name, p in model.named_parameters()}
    assert found == {name: id(p) in grouped for name, p in model.named_parameters()}
    return found


@worked("finetune-trainable-masks")
def test_policies_train_the_parameters_of_their_papers(case: Case) -> None:
    for policy, train in POLICIES.items():
        ours = trained(train)
        case.holds(**{policy: [ours[OURS[name]] for name in case.inputs["parameters"]]})


def constant(output: Tensor, gate: float, train: dict[str, Any]) -> Layer:
    """One expert that gives a token an output [d], whatever it is given, weighted by a gate."""
    moe = {
        "experts": {"count": 1, "width": 1, "activation": "relu", "bias": True},
        "router": {"select": 1, "affinity": "sigmoid", "score": {"kind": "linear", "bias": True}},
    }
    layer = Layer(moe, len(output), train=train)
    layer.set(up=0.0, up_bias=0.0, down=0.0, down_bias=output.unsqueeze(0))
    return layer.set(router=0.0, router_bias=math.log(gate / (1 - gate)))


@worked("nllb-expert-output-masking")
def test_transformers_masks_in_training_and_shrinks_in_evaluation(case: Case) -> None:
    rate, gate, output = case.inputs["p"], case.inputs["gate"], case["expert_output"]
    layer = constant(output, gate, {"preset": "nllb-moe-transformers", "dropout": {"dense": 0.0}})
    tokens = torch.zeros(500, 2, dtype=torch.float64)
    case.holds(eval_contribution=layer.run(tokens[:1], training=False)[0])
    torch.manual_seed(0)
    given = layer.run(tokens)
    left = given != 0
    same(given[left[:, 0], 0][0], gate * 1.0 / (1 - rate))
    same(given[left[:, 1], 1][0], gate * -2.0 / (1 - rate))
    assert given.unique().numel() == 3
    assert abs(float(left.double().mean()) - (1 - rate)) < 0.04


@worked("expert-gradient-scaling")
def test_gradients_of_experts_are_divided(case: Case) -> None:
    world = case.inputs["world_size"]
    local = case["per_rank_gradient_of_local_mean_loss"]
    found = {}
    for name, factor in {
        "summed": 1.0,
        "divided_by_world": 1 / world,
        "divided_by_sqrt_world": 1 / math.sqrt(world),
    }.items():
        rates = {"experts": {"gradient": factor}}
        layer = constant(torch.zeros(2, dtype=torch.float64), 0.5, {"rates": rates})
        out = layer.run(torch.zeros(world, 2, dtype=torch.float64))
        (out[:, 0] / 0.5 @ local).backward()  # a token of each device, and its gradient there
        found[name] = layer.net.down_bias.grad[0, 0]
        assert layer.net.router_bias.grad.isfinite().all()
    case.holds(**found)
