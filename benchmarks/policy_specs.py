"""Routing policies for one tiny decoder over bytes: published presets, and parts of their own."""

from __future__ import annotations

from typing import Any

TASKS = 4  # folders of the library
WIDTH = 128  # of every expert, and of the dense layers
EXPERTS = {"count": 8, "width": WIDTH, "activation": "swiglu"}
PLACEMENT = {"every": 2, "offset": 1, "first_dense": 0, "last": None, "insert": None}
LOSS = {"balance": {"weight": 0.01, "count": "first"}}
TASK = {"id": "task", "count": TASKS}
EXTRA = {"extra": {"width": WIDTH, "activation": "swiglu"}}
INNER = {"noise": "learned", "select": 2, "gate": "softmax_over_kept"}


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """A preset with 8 experts of one shape in every other layer."""
    return {"preset": name, "experts": EXPERTS, "placement": PLACEMENT, **changes}


def policy(router: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A policy of one's own, likewise."""
    return {"experts": EXPERTS, "placement": PLACEMENT, "router": router, **changes}


# Numbers that belong to more experts or wider models than these are scaled down.
PRESETS: dict[str, dict[str, Any]] = {
    **{
        name: preset(name)
        for name in (
            "shazeer2017-lm",
            "gshard-m4",
            "switch-base",
            "switch-c",
            "glam",
            "artetxe-moe",
            "v-moe",
            "expert-choice",
            "hash",
            "maskmoe",
            "mixtral-8x7b",
            "dmoe",
            "chen2022-toy",
            "jacobs1991",
        )
    },
    "st-moe": preset("st-moe", **EXTRA),
    "openmoe-8b": preset("openmoe-8b", **EXTRA),
    "base": {"preset": "base", "experts": EXPERTS},
    "soft-moe": preset("soft-moe", router={"select": {"kind": "soft", "slots": 16}}),
    "x-moe": preset("x-moe", router={"score": {"kind": "cosine", "dim": 4}}),
    "gmoe": preset("gmoe", router={"score": {"kind": "cosine", "dim": 32}}),
    "limoe": preset(
        "limoe", losses={"text_global": {"spread": 2.0}, "image_global": {"spread": 5.0}}
    ),
    "task-moe": preset("task-moe", router={"input": {"kind": "id", **TASK}}),
    "mmoe": preset("mmoe", router={"gates": TASK}),
    "mod-squad": preset(
        "mod-squad", router={"gates": TASK}, losses={"mutual_information": {"count": TASKS}}
    ),
    "deepseekmoe-16b": preset("deepseekmoe-16b", shared=1, router={"select": 2}),
    "deepseek-v2": preset(
        "deepseek-v2",
        shared=1,
        router={"restrict": {"kind": "groups", "groups": 4, "keep": 2}, "select": 2},
        capacity={"devices": 4},
        losses={
            "device_balance": {"devices": 4},
            "communication_balance": {"devices": 4, "limit": 2},
        },
    ),
    "deepseek-v3": preset(
        "deepseek-v3",
        router={"restrict": {"kind": "groups", "groups": 4, "keep": 2}, "select": 2},
    ),
    "shazeer2017-hierarchical": preset(
        "shazeer2017-hierarchical",
        experts={"count": 4, "width": WIDTH // 2, "activation": "swiglu", "nested": {"count": 4}},
    ),
    "hme1994": preset("hme1994", experts={**EXPERTS, "count": 4, "nested": {"count": 2}}),
}

PARTS: dict[str, dict[str, Any]] = {
    "plain top-2": policy({"select": 2, "gate": "sum"}),
    "logits capped": policy({"score": {"cap": 5.0}, "select": 2}, losses=LOSS),
    "cosine of torchscale": policy(
        {
            "score": {"kind": "cosine", "dim": 4, "normalize": "experts", "temperature": "none"},
            "affinity": "sigmoid",
            "select": 1,
        },
        losses=LOSS,
    ),
    "gaussian densities": policy({"score": "gaussian", "select": 2}, losses=LOSS),
    "laplace densities": policy({"score": "laplace", "select": 2}, losses=LOSS),
    "balanced table": policy({"score": {"kind": "table", "by": "balanced"}, "select": 1}),
    "sigmoid": policy({"affinity": "sigmoid", "select": 2, "gate": "sum"}, losses=LOSS),
    "uniform noise (FastMoE)": policy(
        {"noise": {"kind": "uniform", "low": 0.9, "high": 1.1}, "select": 1}, losses=LOSS
    ),
    "sampled (Gumbel)": policy({"noise": "gumbel", "select": 1}, losses=LOSS),
    "router input dropout": policy(
        {"noise": {"kind": "dropout", "rate": 0.1}, "select": 1}, losses=LOSS
    ),
    "second never": policy(
        {"select": {"k": 2, "second": {"policy": "none", "eval_policy": "none"}}, "gate": "sum"},
        losses=LOSS,
    ),
    "second above a threshold": policy(
        {
            "select": {"k": 2, "second": {"policy": "threshold", "eval_policy": "threshold"}},
            "gate": "sum",
        },
        losses=LOSS,
    ),
    "second drawn": policy(
        {"select": {"k": 2, "second": "sampling"}, "gate": "sum"}, capacity=2.0, losses=LOSS
    ),
    "GShard as printed": policy(
        {
            "select": {
                "k": 2,
                "second": {"policy": "random", "threshold": 0.5, "takes_slot": True},
            },
            "gate": "sum",
        },
        capacity=2.0,
        losses=LOSS,
    ),
    "no token left behind": policy(
        {"select": 1, "noise": 0.01}, capacity={"factor": 1.0, "overflow": "next"}, losses=LOSS
    ),
    "best C of an expert": policy(
        {"select": 1}, capacity={"factor": 1.0, "priority": "weight"}, losses=LOSS
    ),
    "overflow keeps the token": policy(
        {"select": 1}, capacity={"factor": 1.0, "overflow": "input"}, losses=LOSS
    ),
    "BPR by sum of weights": policy(
        {"select": 2},
        capacity={"factor": 1.0, "priority": "confidence_sum"},
        group="sequence",
        losses=LOSS,
    ),
    "expert choice of Mesh-TF": policy(
        {
            "select": {"kind": "expert_choice", "factor": 2.0},
            "affinity": "softmax_over_tokens",
            "gate": "count",
        },
        losses={"token_balance": 0.01},
    ),
    "strictly balanced": policy(
        {"select": {"kind": "expert_choice", "factor": 2.0}, "gate": "sum"}
    ),
    "soft, plain logits": policy({"select": {"kind": "soft", "slots": 16}}),
    "by sentence": policy({"input": "sentence", "select": 2, "gate": "sum"}, losses=LOSS),
    "experts by modality": policy(
        {
            "restrict": {"kind": "partition", "id": "modality", "experts": [3, 5]},
            "select": 1,
        },
    ),
    "identity and zero experts": policy(
        {"select": 3, "gate": "sum", "balance_bias": 0.001},
        experts={**EXPERTS, "identity": 2, "zero": 1},
    ),
    "constant gate": policy({"select": 1, "gate": "constant"}, losses=LOSS),
    "divided by the 2-norm": policy(
        {"select": 2, "gate": {"normalize": "sum", "power": 2.0}}, losses=LOSS
    ),
    "fine-grained (m = 4)": policy(
        {"select": 2, "gate": "sum"}, granularity=4, losses={"balance": 0.01}
    ),
    "beside a dense network": policy({"select": 1}, residual=WIDTH, losses=LOSS),
    "nested, capacity outside": policy(
        {"select": 1},
        experts={
            "count": 4,
            "width": WIDTH // 2,
            "activation": "swiglu",
            "nested": {"count": 4, "router": {**INNER, "noise": "gaussian"}},
        },
        capacity=1.25,
    ),
}

SINGLE = policy({"select": 1, "gate": "constant"}, experts={**EXPERTS, "count": 1})
POLICIES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "a single expert": SINGLE,
    **PRESETS,
    **PARTS,
}


def spec(moe: dict[str, Any] | None) -> dict[str, Any]:
    """The decoder that all policies share."""
    model: dict[str, Any] = {
        "vocab_size": 256,
        "d_model": 64,
        "layers": 2,
        "max_sequence": 128,
        "attention": {"heads": 4},
        "ffn": WIDTH,
    }
    if moe:
        model["moe"] = {**moe, "non_causal": "warn"}
    return {"name": "policy", "model": model}
