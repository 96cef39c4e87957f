"""Specs at tiny size that between them use every part of the language."""

from __future__ import annotations

from typing import Any


def spec(name: str, model: dict[str, Any], **rest: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "kind": "decoder",
        "vocab_size": 61,
        "d_model": 32,
        "layers": 2,
        "max_sequence": 64,
        "attention": {"heads": 4, "kv_heads": 2},
        "ffn": 48,
    }
    return {"name": name, "model": {**base, **model}, **rest}


def moe(**changes: Any) -> dict[str, Any]:
    return {"experts": {"count": 8, "width": 16}, "router": {"select": 2}, **changes}


ALL_LOSSES = {"balance": 0.01, "z": 0.001, "sequence_balance": 0.0001}

SPECS: dict[str, dict[str, Any]] = {
    s["name"]: s
    for s in (
        spec("dense", {}),
        spec("plain-moe", {"moe": moe()}),
        spec(
            "mixtral-like",
            {
                "moe": moe(
                    router={"select": 2, "gate": "softmax_over_kept"},
                    losses={"balance": {"weight": 0.02, "count": "all", "reduction": "pooled"}},
                )
            },
        ),
        spec(
            "deepseek-v3-like",
            {
                "layers": 4,
                "attention": {
                    "kind": "mla",
                    "heads": 4,
                    "q_rank": 24,
                    "kv_rank": 16,
                    "nope_dim": 8,
                    "rope_dim": 8,
                    "value_dim": 12,
                    "rope": {
                        "layout": "interleaved",
                        "scaling": {
                            "kind": "yarn",
                            "factor": 4.0,
                            "original": 16,
                            "mscale": 1.0,
                            "mscale_all_dim": 0.7,
                        },
                    },
                },
                "moe": moe(
                    placement={"first_dense": 1},
                    shared={"count": 1},
                    router={
                        "affinity": "sigmoid",
                        "balance_bias": 0.001,
                        "restrict": {"groups": 4, "keep": 2, "by": "top2_sum"},
                        "select": 3,
                        "gate": {"normalize": "sum", "scale": 2.5, "eps": 1.0e-20},
                    },
                    losses={"sequence_balance": 0.0001},
                ),
            },
        ),
        spec(
            "deepseek-v2-like",
            {
                "attention": {
                    "kind": "mla",
                    "heads": 2,
                    "kv_rank": 16,
                    "nope_dim": 8,
                    "rope_dim": 4,
                    "value_dim": 8,
                },
                "moe": moe(
                    router={
                        "restrict": {"groups": 4, "keep": 2, "by": "max"},
                        "select": 2,
                        "gate": {"scale": 16.0},
                    }
                ),
            },
        ),
        spec(
            "gpt-oss-like",
            {
                "layers": 4,
                "attention": {
                    "heads": 4,
                    "kv_heads": 2,
                    "bias": "all",
                    "sinks": True,
                    "window": {"size": 5, "placement": {"every": 2}},
                },
                "ffn": None,
                "moe": {
                    "experts": {
                        "count": 8,
                        "width": 24,
                        "activation": "clamped_swiglu",
                        "bias": True,
                    },
                    "router": {
                        "score": {"bias": True},
                        "select": 2,
                        "gate": "softmax_over_kept",
                    },
                    "losses": {"balance": {"weight": 0.9, "reduction": "mean"}},
                },
            },
        ),
        spec(
            "llama4-like",
            {
                "layers": 4,
                "attention": {
                    "heads": 4,
                    "kv_heads": 2,
                    "rope": None,
                    "qk_norm": "unit",
                    "temperature": {"scale": 0.3, "floor": 3},
                    "window": {
                        "size": 5,
                        "chunked": True,
                        "placement": {"last_dense": 1},
                        "rope": {"layout": "interleaved"},
                    },
                },
                "moe": moe(
                    placement={"every": 2, "offset": 1},
                    shared={"count": 1},
                    router={"affinity": "sigmoid", "select": 1, "gate": {"scales": "input"}},
                    losses={},
                ),
            },
        ),
        spec(
            "switch-like",
            {
                "layers": 4,
                "norm": {"kind": "layer", "bias": True},
                "ffn": {"width": 48, "activation": "relu", "bias": True},
                "moe": {
                    "placement": {"every": 2, "offset": 1},
                    "experts": {"count": 4, "width": 48, "activation": "relu", "bias": True},
                    "router": {"noise": {"kind": "jitter", "eps": 0.01}, "select": 1},
                    "capacity": {"factor": 1.25, "eval_factor": 2.0, "minimum": 4},
                    "losses": {
                        "balance": {"weight": 0.01, "count": "first"},
                        "z": 0.001,
                    },
                },
            },
            init={"kind": "truncated", "scale": 0.1},
            train={"dropout": {"dense": 0.1, "experts": 0.4}},
        ),
        spec(
            "capacity-per-choice",
            {
                "moe": moe(
                    capacity={
                        "factor": 0.5,
                        "convention": "per_choice",
                        "rounding": "ceil",
                        "multiple": 4,
                    },
                    losses=ALL_LOSSES,
                )
            },
        ),
        spec(
            "expert-choice",
            {"moe": moe(router={"select": {"kind": "expert_choice", "factor": 2.0}})},
        ),
        spec(
            "fine-grained",
            {"moe": moe(granularity=2, shared={"count": 2, "width": 8, "gate": True}, residual=24)},
        ),
        spec(
            "overrides",
            {
                "layers": 5,
                "moe": moe(
                    overrides=[
                        {"layers": [1], "experts": {"count": 4, "width": 32}},
                        {"layers": [2, 3], "shared": {"count": 1}, "capacity": 1.0},
                    ],
                    losses={"balance": 0.01},
                ),
            },
        ),
        spec(
            "grok-like",
            {
                "norm": {"kind": "rms", "placement": "sandwich", "eps": 1.0e-5},
                "embedding": {"scale": 78.0},
                "attention": {"heads": 4, "kv_heads": 2, "softcap": 30.0, "scale": 0.1},
                "head": {"tied": True, "scale": 0.6, "softcap": 30.0},
                "moe": moe(
                    experts={"count": 4, "width": 16, "activation": "geglu"},
                    router={"score": {"cap": 20.0}, "select": 2},
                ),
            },
        ),
        spec(
            "windowed",
            {
                "layers": 4,
                "norm": {"kind": "rms", "placement": "output"},
                "attention": {
                    "heads": 4,
                    "kv_heads": 1,
                    "head_dim": 12,
                    "qk_norm": "full",
                    "clip": 8.0,
                    "rope": {"theta": 10000.0, "dim": 6},
                    "window": {
                        "size": 4,
                        "placement": {"every": 2, "offset": 1},
                        "rope": {"theta": 500.0},
                    },
                },
                "moe": moe(placement={"last": 2}),
            },
        ),
        spec(
            "long-ropes",
            {
                "norm": {"kind": "layer", "bias": False, "placement": "post"},
                "attention": {
                    "heads": 4,
                    "bias": "qkv",
                    "qk_norm": "head",
                    "rope": {"scaling": {"kind": "dynamic", "factor": 2.0, "original": 8}},
                },
                "embedding": {"scale": "sqrt_d_model"},
                "residual_scale": 0.22,
                "head": {"bias": True},
            },
        ),
        spec(
            "longrope",
            {
                "attention": {
                    "heads": 4,
                    "rope": {
                        "scaling": {
                            "kind": "longrope",
                            "original": 8,
                            "factor": 4.0,
                            "short": [1.0, 1.1, 1.2, 1.3],
                            "long": [2.0, 3.0, 4.0, 5.0],
                        }
                    },
                }
            },
        ),
        spec("llama3-rope", {"attention": {"heads": 4, "rope": {"scaling": "llama3"}}}),
        spec(
            "no-rope",
            {"attention": {"heads": 4, "rope": None}, "ffn": {"width": 8, "activation": "relu2"}},
        ),
        spec("bf16", {"moe": moe(shared=1, losses=ALL_LOSSES)}, precision={"parameters": "bf16"}),
        spec(
            "mixed",
            {"moe": moe(shared=1)},
            precision={"compute": "bf16", "cache": "fp32", "experts": "fp32"},
        ),
        spec(
            "fp64",
            {"moe": moe(losses=ALL_LOSSES, capacity=1.0)},
            precision={"parameters": "fp64", "router": "fp64"},
        ),
    )
}
