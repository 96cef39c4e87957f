"""Tiny specs of models on vectors, mixtures and multi-task ones, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BATCH = 6


def mixture(name: str, target: Any, layers: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
    """A mixture on three numbers."""
    top = {key: rest.pop(key) for key in ("precision", "init", "train") if key in rest}
    model = {"kind": "mixture", "inputs": 3, "target": target, "layers": layers, **rest}
    return {"name": name, "model": model, **top}


RELU = {"count": 4, "activate_output": True}
NOISY = {"select": 2, "noise": "learned", "gate": "softmax_over_kept"}
UNLIKE = {"experts": {"count": 2}, "others": [{"count": 3, "hidden": [7, 5]}], "router": NOISY}
TREE = {"score": {"kind": "tree", "branches": [2, 3]}}
CHEN = {
    "experts": {"count": 4, "hidden": [6], "activation": "cubic", "signs": True, "bias": False},
    "patches": 5,
    "router": {"select": 1, "noise": {"kind": "uniform", "selection_only": True}},
}
WIDE = {"parameters": "fp64", "router": "fp64"}

MIXTURES: dict[str, dict[str, Any]] = {
    s["name"]: s
    for s in (
        mixture("cooperative", 2, [{"experts": 4}]),
        mixture("competitive", 2, [{"experts": 4}], objective="competitive"),
        mixture("likely", {"outputs": 2, "variance": 0.5}, [{"experts": 4}], objective="mixture"),
        mixture("tree", "binary", [{"experts": 6, "router": TREE}], objective="mixture"),
        mixture("bits", "binary", [{"experts": {"count": 3, "hidden": [4]}}]),
        mixture(
            "classes",
            {"kind": "classes", "count": 3},
            [{"experts": {"count": 4, "hidden": [5], "bias": False}}],
            objective="mixture",
        ),
        mixture("vote", {"kind": "classes", "count": 3}, [{"experts": 4}], pooling="vote"),
        mixture("average", {"kind": "classes", "count": 3}, [{"experts": 4}], pooling="average"),
        mixture("winner", 2, [{"experts": 4}], pooling="winner"),
        mixture(
            "deep",
            {"kind": "classes", "count": 3},
            [
                {
                    "experts": RELU,
                    "width": 7,
                    "margin": 0.5,
                    "router": {"score": {"kind": "network", "hidden": [5, 4]}},
                },
                {"experts": {**RELU, "count": 5}, "width": 6, "losses": {"importance": 0.1}},
            ],
            head={},
        ),
        mixture("patches", "binary", [{**CHEN, "losses": {"balance": 0.01, "z": 0.1}}]),
        mixture("dense-patches", "binary", [{**CHEN, "router": {"select": "all"}}]),
        mixture(
            "unlike",
            {"kind": "classes", "count": 3},
            [
                {**UNLIKE, "width": 8, "losses": {"importance": 0.1, "load": 0.1}},
                {**UNLIKE, "width": 6},
            ],
            head={"bias": False},
        ),
        mixture(
            "annealed",
            2,
            [
                {**UNLIKE, "width": 4, "anneal": {"start": 4, "steps": 10}},
                {
                    "experts": 4,
                    "router": {**NOISY, "select": 1},
                    "anneal": {"start": 3, "steps": 20},
                },
            ],
        ),
        mixture(
            "stochastic",
            2,
            [
                {
                    **UNLIKE,
                    "router": {"affinity": "sigmoid"},
                    "stochastic": {"target": 0.4, "variance": 0.1},
                    "width": 4,
                },
                {"experts": 4, "router": {"affinity": "sigmoid"}, "stochastic": 0.5},
            ],
        ),
        mixture("unlike-dense", 2, [{**UNLIKE, "router": {}}]),
        mixture("fp64", 2, [{"experts": 4}], precision=WIDE),
        mixture(
            "bf16",
            2,
            [{"experts": {"count": 4, "hidden": [8]}, "router": {"select": 2}}],
            precision={"parameters": "bf16"},
        ),
        mixture(
            "dropout",
            2,
            [{"experts": {"count": 4, "hidden": [8]}}],
            train={"dropout": {"experts": 0.5}},
        ),
    )
}


def batch_of(spec: dict[str, Any], count: int = BATCH, seed: int = 1) -> tuple[Tensor, Any]:
    """Examples and targets for a spec of a mixture."""
    chance = torch.Generator().manual_seed(seed)
    model = spec["model"]
    patches = model["layers"][0].get("patches")
    shape = (count, patches, model["inputs"]) if patches else (count, model["inputs"])
    x = torch.randn(shape, generator=chance)
    return x, targets(model["target"], count, chance)


def targets(target: Any, count: int, chance: torch.Generator) -> Tensor:
    """Targets of a section."""
    if target == "binary":
        return torch.randint(0, 2, (count,), generator=chance)
    if isinstance(target, dict) and target.get("kind") == "classes":
        return torch.randint(0, target["count"], (count,), generator=chance)
    size = target["outputs"] if isinstance(target, dict) else target
    return torch.randn(count, size, generator=chance)


def multitask(name: str, mixture: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """A model of three tasks on five numbers."""
    top = {key: rest.pop(key) for key in ("precision", "init", "train") if key in rest}
    tasks = {
        "clicks": "binary",
        "kind": {"target": {"kind": "classes", "count": 3}, "weight": 0.5},
        "price": "values",
    }
    model: dict[str, Any] = {"kind": "multitask", "inputs": 5, "tower": {"hidden": [3]}}
    model |= {"mixture": {"width": 6, **mixture}, "tasks": tasks, **rest}
    return {"name": name, "model": model, **top}


TASKS: dict[str, dict[str, Any]] = {
    s["name"]: s
    for s in (
        multitask("mmoe", {"experts": RELU}),
        multitask("omoe", {"experts": {**RELU, "bias": False}}, gates="shared"),
        multitask("bottom", {"experts": {"count": 1, "hidden": [4]}}, gates="none"),
        multitask("unlike-mmoe", {**UNLIKE, "router": {}}),
        multitask(
            "sparse-mmoe", {"experts": RELU, "router": {"select": 2}, "losses": {"balance": 0.1}}
        ),
        multitask("sparse-omoe", {**UNLIKE, "losses": {"load": 0.1}}, gates="shared"),
        multitask("mmoe-fp64", {"experts": RELU, "router": {"noise": "gaussian"}}, precision=WIDE),
        multitask("mmoe-bf16", {"experts": RELU}, precision={"parameters": "bf16"}),
    )
}


def labels_of(spec: dict[str, Any], count: int = BATCH, seed: int = 1) -> tuple[Tensor, Any]:
    """Examples and labels by task for a spec of several tasks."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn((count, spec["model"]["inputs"]), generator=chance)
    known = {}
    for name, task in spec["model"]["tasks"].items():
        target = task["target"] if isinstance(task, dict) else task
        known[name] = targets(1 if target == "values" else target, count, chance)
    return x, known


ALL = {**MIXTURES, **TASKS}


def any_batch(spec: dict[str, Any], count: int = BATCH) -> tuple[Tensor, Any]:
    """Examples and what is known of them, for a spec of either kind."""
    made = labels_of if spec["model"]["kind"] == "multitask" else batch_of
    return made(spec, count)
