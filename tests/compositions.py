"""Random compositions of a router's parts, and a layer whose output shows its weights."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st
from tiny_specs import spec
from torch import Tensor

import moegen
from moegen.errors import SpecError
from moegen.planner import Plan

EXPERTS = 8
TASKS = 2

SCORES = [
    {"kind": "linear"},
    {"kind": "linear", "bias": True},
    {"kind": "linear", "cap": 5.0},
    {"kind": "cosine", "dim": 6},
    {"kind": "cosine", "temperature": "exp", "start": 0.5},
    {"kind": "gaussian"},
    {"kind": "laplace"},
]
NOISES = [
    None,
    None,
    {"kind": "jitter"},
    {"kind": "dropout"},
    {"kind": "gaussian"},
    {"kind": "gaussian", "selection_only": True},
    {"kind": "learned"},
    {"kind": "uniform"},
    {"kind": "gumbel"},
]
SELECTIONS = [
    *({"kind": "top_k", "k": k} for k in (1, 2, 3)),
    {"kind": "top_k", "k": 2, "second": {"policy": "random", "eval_policy": "threshold"}},
    {"kind": "top_k", "k": 2, "second": "sampling"},
    {"kind": "top_k", "k": 3, "second": {"policy": "threshold", "threshold": 0.3}},
    {"kind": "all"},
    {"kind": "balanced"},
    {"kind": "expert_choice", "factor": 2.0},
    {"kind": "soft", "slots": 1},
]
GATES = [
    {},
    {"normalize": "sum"},
    {"normalize": "sum", "after_drop": True},
    {"normalize": "softmax_over_kept"},
    {"normalize": "constant"},
    {"normalize": "sum", "scale": 2.5},
    {"normalize": "sum", "power": 2.0},
]
RESTRICTIONS = [None, None, {"groups": 4, "keep": 2}, {"groups": 2, "keep": 1, "by": "top2_sum"}]
CAPACITIES = [
    None,
    None,
    {"factor": 0.5},
    {"factor": 1.0, "convention": "per_choice", "priority": "confidence"},
    {"factor": 0.75, "priority": "weight"},
    {"factor": 1.0, "overflow": "next", "minimum": 1},
    {"slots": 3},
]
INPUTS = ["token", "token", "sentence", {"kind": "id", "id": "task", "count": TASKS}]


def drawn(seed: int) -> dict[str, Any] | None:
    """The `moe` section of a spec, parts taken by chance; None if they do not go together."""
    chance = random.Random(seed)
    moe = {
        "experts": {"count": EXPERTS, "width": 8, "bias": True, "activation": "relu"},
        "router": {
            "input": chance.choice(INPUTS),
            "score": chance.choice(SCORES),
            "noise": chance.choice(NOISES),
            "affinity": chance.choice(["softmax", "softmax", "sigmoid"]),
            "restrict": chance.choice(RESTRICTIONS),
            "select": chance.choice(SELECTIONS),
            "gate": chance.choice(GATES),
        },
        "capacity": chance.choice(CAPACITIES),
        "group": chance.choice(["batch", "batch", "sequence", 5]),
        "losses": chance.choice([{}, {"balance": 0.01, "z": 0.001}, {"z": 0.001}]),
        "non_causal": "accept",
    }
    try:
        moegen.load(wrapped(moe))
    except SpecError:
        return None
    return moe


@cache
def pool() -> list[dict[str, Any]]:
    """The first so many compositions that are accepted; MOEGEN_COMPOSITIONS asks for more."""
    wanted = int(os.environ.get("MOEGEN_COMPOSITIONS", "32"))
    accepted = (moe for moe in map(drawn, itertools.count()) if moe is not None)
    return list(itertools.islice(accepted, wanted))


def mixtures(
    fits: Callable[[dict[str, Any]], bool] = lambda moe: True,
) -> st.SearchStrategy[dict[str, Any]]:
    """Compositions that fit, each emitted once for all properties."""
    return st.deferred(lambda: st.sampled_from([moe for moe in pool() if fits(moe)]))


def wrapped(moe: dict[str, Any]) -> dict[str, Any]:
    """A decoder of one layer, as wide as it has experts, in fp64."""
    width = {"d_model": EXPERTS, "layers": 1, "attention": {"heads": 1}, "vocab_size": 17}
    precise = {"parameters": "fp64", "router": "fp64"}
    return spec("drawn", {**width, "moe": moe}, precision=precise)


def planned(moe: dict[str, Any]) -> Plan:
    """The plan of its decoder, for two sequences of six tokens."""
    return _planned(json.dumps(moe, sort_keys=True))


def package(moe: dict[str, Any]) -> ModuleType:
    """The emitted package of its decoder."""
    return _package(json.dumps(moe, sort_keys=True))


def layer(moe: dict[str, Any], seed: int = 0) -> Any:
    """Its emitted layer alone, with parameters that make every part matter."""
    torch.manual_seed(seed)
    made = package(moe).model.MoE()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return made


def showing(moe: dict[str, Any], seed: int = 0) -> Any:
    """The layer with experts that answer with their own number, so its output is its weights."""
    made = layer(moe, seed)
    with torch.no_grad():
        for name in ("up", "up_bias", "down"):
            getattr(made, name).zero_()
        made.down_bias.copy_(torch.eye(EXPERTS))
    return made


def run(made: Any, moe: dict[str, Any], x: Tensor, valid: Tensor | None = None) -> tuple[Any, Any]:
    """Its output and record for x [B, S, d], with a task for every token if it wants one."""
    tokens = x.shape[0] * x.shape[1]
    valid = torch.ones(tokens, dtype=torch.bool) if valid is None else valid
    names = planned(moe).spec.model.given()
    given = [torch.arange(tokens) // x.shape[1] % TASKS for _ in names]
    return made(x, valid, *given)


@cache
def _planned(text: str) -> Plan:
    return moegen.plan(wrapped(json.loads(text)), batch=2, sequence=6)


@cache
def _package(text: str) -> ModuleType:
    return moegen.module(_planned(text))
