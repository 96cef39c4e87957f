"""One tiny decoder for every policy of routing, each mixture as a spec would write it."""

from __future__ import annotations

from typing import Any

from tiny_specs import spec

EXPERTS = {"count": 8, "width": 16}
TASK = {"id": "task", "count": 3}


def mixture(router: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"experts": EXPERTS, "router": router, **changes}


def first(weight: float = 0.01) -> dict[str, Any]:
    return {"balance": {"weight": weight, "count": "first"}}


MIXTURES: dict[str, dict[str, Any]] = {
    "linear": mixture({"score": {"bias": True}, "select": 2}, losses={"balance": 0.01, "z": 0.001}),
    "capped": mixture({"score": {"cap": 5.0}, "select": 2}),
    "cosine-paper": mixture({"score": {"kind": "cosine", "dim": 4}, "select": 1}, losses=first()),
    "cosine-torchscale": mixture(
        {
            "score": {"kind": "cosine", "dim": 4, "normalize": "experts", "temperature": "none"},
            "affinity": "sigmoid",
            "select": 1,
        }
    ),
    "cosine-gmoe": mixture(
        {
            "score": {
                "kind": "cosine",
                "dim": 12,
                "bias": True,
                "temperature": "exp",
                "start": 0.5,
            },
            "noise": "gaussian",
            "select": 1,
        },
        capacity={"factor": 1.5, "convention": "per_rank", "priority": "confidence"},
        losses={
            "importance": {"weight": 0.005, "of": "scores"},
            "load": {"weight": 0.005, "threshold": "kth"},
        },
    ),
    "gaussian": mixture({"score": "gaussian", "select": 2}),
    "laplace": mixture({"score": {"kind": "laplace", "priors": False}, "select": 2}),
    "hash": mixture({"score": "table", "select": 1}),
    "hash-balanced": mixture(
        {"score": {"kind": "table", "by": "balanced"}, "select": 1}, capacity=1.0
    ),
    "sigmoid": mixture({"affinity": "sigmoid", "select": 2, "gate": "sum"}),
    "shazeer": mixture(
        {"noise": "learned", "select": 4, "gate": "softmax_over_kept"},
        losses={"importance": 0.1, "load": 0.1},
    ),
    "fastmoe-switch": mixture(
        {"noise": {"kind": "uniform", "low": 0.9, "high": 1.1}, "select": 1}, losses=first()
    ),
    "chen": mixture({"noise": {"kind": "uniform", "selection_only": True}, "select": 1}),
    "sampled": mixture({"noise": "gumbel", "select": 1}),
    "input-dropout": mixture({"noise": {"kind": "dropout", "rate": 0.1}, "select": 1}),
    "gshard": mixture(
        {
            "select": {"k": 2, "second": {"policy": "random", "threshold": 0.5}},
            "gate": "sum",
        },
        capacity=2.0,
        group="sequence",
        losses=first(),
    ),
    "gshard-printed": mixture(
        {
            "select": {"k": 2, "second": {"policy": "random", "takes_slot": True}},
            "gate": "sum",
        },
        capacity=1.0,
    ),
    "second-threshold": mixture(
        {
            "select": {"k": 3, "second": {"policy": "threshold", "eval_policy": "threshold"}},
            "gate": "sum",
        },
        capacity=1.0,
    ),
    "second-none": mixture(
        {"select": {"k": 2, "second": {"policy": "none", "eval_policy": "none"}}, "gate": "sum"}
    ),
    "second-sampling": mixture(
        {
            "select": {"k": 2, "second": "sampling"},
            "gate": {"normalize": "sum", "after_drop": True},
        },
        capacity={"slots": 4},
    ),
    "fairseq": mixture(
        {"select": 2, "gate": {"normalize": "sum", "after_drop": True}},
        capacity={"factor": 2.0, "round_first": "share_up", "eval_share": 0.25},
        losses={"balance": {"weight": 0.01, "count": "second"}},
    ),
    "left-behind": mixture(
        {"select": 1, "noise": 0.01},
        capacity={"factor": 1.0, "overflow": "next", "passes": 4, "minimum": 1},
        group=6,
        losses=first(),
    ),
    "switch-max": mixture(
        {"select": 1},
        capacity={"factor": 0.5, "priority": "weight"},
        losses={"balance": {"weight": 0.01, "after_capacity": True}},
    ),
    "overflow-input": mixture({"select": 2}, capacity={"factor": 0.5, "overflow": "input"}),
    "bpr-sum": mixture(
        {"select": 2},
        capacity={"factor": 0.5, "priority": "confidence_sum", "minimum": 1},
        group="sequence",
        losses={"balance": {"weight": 0.01, "after_capacity": True}},
    ),
    "v-moe": mixture(
        {"noise": "gaussian", "select": 2},
        capacity={
            "factor": 1.05,
            "convention": "per_choice",
            "rounding": "ceil",
            "multiple": 4,
            "priority": "confidence",
        },
        losses={
            "importance": {"weight": 0.005, "of": "scores"},
            "load": {"weight": 0.005, "threshold": "kth"},
        },
    ),
    "expert-choice": mixture(
        {"select": {"kind": "expert_choice", "factor": 2.0}}, group="sequence"
    ),
    "expert-choice-mtf": mixture(
        {
            "select": {"kind": "expert_choice", "factor": 2.0},
            "affinity": "softmax_over_tokens",
            "gate": "count",
        },
        losses={"token_balance": 0.01},
    ),
    "strictly-balanced": mixture(
        {"select": {"kind": "expert_choice", "factor": 2.0}, "gate": "sum"}
    ),
    "base": mixture(
        {
            "affinity": "sigmoid",
            "select": {"kind": "balanced"},
            "gate": {"blend": True},
        },
        experts={"count": 4, "width": 16, "residual": True, "sublayers": 2, "activation": "relu"},
    ),
    "soft": mixture({"select": {"kind": "soft", "slots": 2}}),
    "soft-normalised": mixture(
        {
            "score": {"kind": "cosine", "temperature": "scale", "start": 1.0, "eps": 1.0e-6},
            "select": {"kind": "soft", "slots": 1},
        },
    ),
    "mask": mixture(
        {"restrict": {"kind": "visible", "frequent": 4, "coverage": 0.5}, "select": 1},
        capacity=1.25,
        losses=first(),
    ),
    "sentence": mixture({"input": "sentence", "select": 2, "gate": "sum"}, losses=first()),
    "task": mixture({"input": {"kind": "id", **TASK}, "select": 2, "gate": "sum"}, capacity=2.0),
    "modality": mixture(
        {
            "restrict": {"kind": "partition", "id": "modality", "experts": [3, 5]},
            "select": 1,
        },
        losses={
            "z": 0.001,
            "text": {"kind": "local_entropy", "weight": 0.1, "id": "modality", "of": 1},
            "image": {"kind": "global_entropy", "weight": 0.1, "id": "modality", "spread": 2.0},
        },
    ),
    "multi-gate": mixture({"gates": TASK, "select": "all"}),
    "mod-squad": mixture(
        {"gates": TASK, "noise": "learned", "select": 3, "score": {"bias": True}},
        losses={"mutual_information": {"weight": 0.0005, **TASK}},
    ),
    "all": mixture({"select": "all"}, losses={"local_entropy": 0.01, "global_entropy": 0.01}),
    "device-limited": mixture(
        {"restrict": {"groups": 4, "keep": 2}, "select": 2, "gate": {"scale": 16.0}},
        capacity={
            "factor": 1.0,
            "eval_factor": "unlimited",
            "devices": 4,
            "priority": "weight",
            "spare": 0.5,
        },
        losses={
            "balance": 0.003,
            "device_balance": {"weight": 0.05, "devices": 4},
            "communication_balance": {"weight": 0.02, "devices": 4, "limit": 2},
        },
    ),
    "identity": mixture(
        {"select": 3, "gate": "sum", "balance_bias": 0.001},
        experts={**EXPERTS, "identity": 3, "zero": 1},
        capacity=1.0,
    ),
    "constant-gate": mixture({"select": 1, "gate": "constant"}),
    "scaled-inputs": mixture(
        {"select": 2, "affinity": "sigmoid", "gate": {"normalize": "none", "scales": "input"}},
        capacity=1.0,
    ),
    "p-norm": mixture({"select": 2, "gate": {"normalize": "sum", "power": 2.0}, "noise": 0.01}),
    "nested": mixture(
        {"noise": "learned", "select": 2, "gate": "softmax_over_kept"},
        experts={
            "count": 4,
            "width": 16,
            "nested": {
                "count": 3,
                "router": {"noise": "learned", "select": 2, "gate": "softmax_over_kept"},
            },
        },
        losses={"importance": 0.1, "load": 0.1},
    ),
    "nested-dense": mixture(
        {"select": "all"},
        experts={"count": 2, "width": 16, "nested": {"count": 2, "router": {"select": "all"}}},
    ),
    "nested-capacity": mixture(
        {"select": 1},
        experts={
            "count": 4,
            "width": 16,
            "bias": True,
            "nested": {
                "count": 3,
                "router": {
                    "select": {"k": 2, "second": {"policy": "random"}},
                    "score": {"bias": True},
                },
            },
        },
        capacity=0.5,
    ),
}

ROUTED = {name: spec(name, {"moe": moe}) for name, moe in MIXTURES.items()}
