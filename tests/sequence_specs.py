"""Encoder-decoders at tiny size that between them use every part of their language."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import BATCH, token_ids
from torch import Tensor

RELATIVE = {"buckets": 8, "max_distance": 16}


def spec(name: str, model: dict[str, Any], **rest: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "kind": "encoder_decoder",
        "vocab_size": 61,
        "d_model": 32,
        "encoder": 2,
        "decoder": 3,
        "max_sequence": 12,
        "max_target": 9,
        "positions": RELATIVE,
        "attention": {"heads": 4, "scale": 1.0},
        "ffn": {"width": 48, "activation": "relu"},
    }
    return {"name": name, "model": {**base, **model}, **rest}


def moe(**changes: Any) -> dict[str, Any]:
    return {
        "experts": {"count": 6, "width": 16, "activation": "relu"},
        "router": {"select": 2},
        **changes,
    }


NORM = {"kind": "layer", "eps": 1.0e-5}
LOSSES = {"balance": 0.01, "z": 0.001}
SPECS: dict[str, dict[str, Any]] = {
    s["name"]: s
    for s in (
        spec("t5-like", {"head": {"tied": True, "scale": "rsqrt_d_model"}}),
        spec(
            "switch-like",
            {
                "encoder": 4,
                "moe": moe(
                    placement={"every": 2, "offset": 1},
                    router={"noise": {"kind": "jitter", "eps": 0.01}, "select": 1},
                    group="sequence",
                    capacity={"slots": 3},
                    losses={"balance": {"weight": 0.01, "reduction": "pooled"}, "z": 0.001},
                ),
                "head": {"tied": True, "scale": "rsqrt_d_model"},
            },
        ),
        spec(
            "nllb-like",
            {
                "positions": {"kind": "sinusoidal", "offset": 2},
                "embedding": {"scale": "sqrt_d_model"},
                "norm": NORM,
                "start_token": 2,
                "attention": {"heads": 4, "bias": "all"},
                "ffn": {"width": 48, "activation": "relu", "bias": True},
                "moe": moe(
                    experts={"count": 6, "width": 16, "activation": "relu", "bias": True},
                    losses=LOSSES,
                    placement={"every": 2, "offset": 1},
                ),
                "head": {"tied": True},
            },
        ),
        spec(
            "st-moe-like",
            {
                "ffn": {"width": 24, "activation": "geglu"},
                "encoder": {"layers": 2, "placement": {"last": 1}},
                "decoder": {"layers": 4, "placement": {"every": 2}},
                "moe": moe(
                    extra={"width": 24, "activation": "geglu", "norm_scale": False}, losses=LOSSES
                ),
            },
        ),
        spec(
            "tables-of-layers",
            {
                "positions": {**RELATIVE, "per_layer": True},
                "attention": {"heads": 4, "kv_heads": 2},
                "encoder": {"layers": 2, "placement": "none"},
                "moe": moe(router={"select": 2, "balance_bias": 0.01}),
            },
        ),
        spec(
            "turned",
            {
                "positions": "none",
                "attention": {"heads": 4, "kv_heads": 1, "rope": 10000.0},
                "decoder": {"layers": 2, "placement": "none"},
                "moe": moe(router={"gates": {"id": "task", "count": 3}, "select": 2}),
            },
        ),
        spec(
            "nowhere",
            {"positions": None, "moe": moe(), "ffn": None, "residual_scale": 0.5},
        ),
        spec(
            "mixed",
            {"moe": moe(losses=LOSSES, placement={"last": 1})},
            precision={"compute": "bf16", "cache": "fp32", "experts": "fp32"},
        ),
    )
}

SOURCE, TARGET = 12, 9
TASK = {"turned": torch.tensor([2, 0])}  # what routers read beside tokens


def given(name: str) -> dict[str, Tensor]:
    return {"task": TASK[name]} if name in TASK else {}


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Source and target ids, and which of them are real."""
    mask = torch.arange(SOURCE) < torch.tensor([[SOURCE], [7]])
    decoder_mask = torch.arange(TARGET) < torch.tensor([[6], [TARGET]])
    return token_ids(BATCH, SOURCE), token_ids(BATCH, TARGET, seed=2), mask, decoder_mask
