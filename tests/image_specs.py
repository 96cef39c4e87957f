"""Vision models at tiny size that between them use every part that is theirs, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import filled, imported
from torch import Tensor

BATCH, CLASSES, TASKS = 3, 5, 2


def spec(name: str, model: dict[str, Any], **rest: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "kind": "vision",
        "image": {"size": 8, "patch": 2, "channels": 3},
        "classes": CLASSES,
        "d_model": 32,
        "layers": 2,
        "attention": {"heads": 4, "bias": "all"},
        "ffn": {"width": 48, "activation": "gelu", "bias": True},
    }
    return {"name": name, "model": {**base, **model}, **rest}


def experts(count: int = 4) -> dict[str, Any]:
    return {"count": count, "width": 24, "bias": True}


VMOE = {"preset": "v-moe", "experts": experts(), "placement": {"every": 2, "offset": 1}}
TASK = {"id": "task", "count": TASKS}
MOD_SQUAD = {
    "preset": "mod-squad",
    "experts": {**experts(), "activation": "gelu"},
    "router": {"gates": {"count": TASKS}, "select": 2},
    "losses": {"mutual_information": {"count": TASKS}},
}

VISION: dict[str, dict[str, Any]] = {
    s["name"]: s
    for s in (
        spec("vit", {}),
        spec(
            "vit-average",
            {
                "positions": "sincos",
                "pool": "average",
                "head": {"representation": 24, "bias": False, "smoothing": 0.1},
            },
            train={"dropout": {"dense": 0.1}},
        ),
        spec("vit-attention", {"pool": "attention", "positions": "none"}),
        spec(
            "vit-attention-own",
            {
                "pool": {"kind": "attention", "heads": 2, "ffn": {"width": 40}},
                "norm": {"kind": "rms"},
                "image": {"size": 6, "patch": 3, "channels": 1},
            },
        ),
        spec("vmoe", {"moe": VMOE}, init={"experts": {"identical": True}}),
        spec(
            "vmoe-last",
            {
                "layers": 6,
                "moe": {
                    **VMOE,
                    "placement": {"every": 2, "offset": 1, "last": 2},
                    "capacity": {"factor": 0.5, "priority": "confidence"},
                    "router": {"select": 1, "balance_bias": 0.01},
                },
            },
        ),
        spec(
            "soft-moe",
            {
                "layers": 4,
                "pool": "average",
                "moe": {
                    "preset": "soft-moe",
                    "experts": experts(),
                    "router": {"select": {"slots": 4}},
                },
            },
        ),
        spec(
            "gmoe",
            {
                "layers": 4,
                "moe": {
                    "preset": "gmoe",
                    "placement": {"last": 1},
                    "experts": experts(),
                    "router": {"score": {"dim": 16}},
                },
            },
        ),
        spec("mod-squad", {"moe": MOD_SQUAD, "head": {"tasks": TASK}}),
        spec("vit-bf16", {"positions": "sincos"}, precision={"parameters": "bf16"}),
        spec("vmoe-mixed", {"moe": VMOE}, precision={"compute": "bf16"}),
    )
}


def images(name: str, batch: int = BATCH, seed: int = 1) -> Tensor:
    """Random images [batch, channels, size, size]."""
    image = VISION[name]["model"]["image"]
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(batch, image["channels"], image["size"], image["size"], generator=chance)


def labels(batch: int = BATCH) -> Tensor:
    """A class for each image."""
    return torch.arange(batch) % CLASSES


def given(name: str, batch: int = BATCH) -> dict[str, Tensor]:
    """What a model is given beside images."""
    names = ["task"] if "tasks" in VISION[name]["model"].get("head", {}) else []
    return {key: torch.arange(batch) % TASKS for key in names}


def ready(name: str) -> Any:
    """The emitted model, with parameters that make every part matter."""
    return filled(imported(VISION[name]).Model)


def tower(name: str, **model: Any) -> dict[str, Any]:
    """A model of images and texts."""
    base = {
        "kind": "two_tower",
        "image": {"size": 8, "patch": 2, "channels": 1},
        "vocab_size": 11,
        "max_sequence": 12,
        "d_model": 32,
        "layers": 2,
        "attention": {"heads": 4, "bias": "all"},
        "ffn": {"width": 48, "activation": "gelu", "bias": True},
        "head": {"width": 16},
    }
    return {"name": name, "model": {**base, **model}}


SPREADS = {"text_global": {"spread": 2.0}, "image_global": {"spread": 3.0}}
TOWERS: dict[str, dict[str, Any]] = {
    s["name"]: s
    for s in (
        tower("dense"),
        tower("limoe", moe={"preset": "limoe", "experts": experts(), "losses": SPREADS}),
    )
}
