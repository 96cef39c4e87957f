"""Routing where it is seldom looked at: autocast, padding, names of ids, typos in overrides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from routing_specs import ROUTED, mixture
from tiny_models import imported, planned, token_ids
from tiny_specs import spec

import moegen
from moegen.errors import SpecError


@pytest.mark.parametrize("name", ["soft", "shazeer", "nested", "identity", "base"])
def test_it_trains_under_autocast(name: str) -> None:
    model: Any = imported(ROUTED[name]).Model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model.training_loss(token_ids())
    loss.backward()
    assert loss.isfinite()


def test_loads_are_even_whatever_is_padded() -> None:
    """A balanced assignment shares real tokens out, however many others stand beside them."""
    model: Any = imported(ROUTED["base"]).Model().train()
    mask = torch.arange(12) < torch.tensor([[12], [1]])
    for record in model(token_ids(), mask).routing:
        assert record.load.sum() == 13
        assert record.load.max() - record.load.min() <= 1


@pytest.mark.parametrize("name", ["torch", "top_k", "out", "temperature", "tokens", "lambda"])
def test_ids_cannot_take_the_names_of_other_things(name: str) -> None:
    moe = mixture({"input": {"kind": "id", "id": name, "count": 3}, "select": 1})
    with pytest.raises(SpecError, match=name):
        moegen.load(spec("named", {"moe": moe}))


@pytest.mark.parametrize(
    ("change", "wrong", "right"),
    [
        ({"router": {"slect": 1}}, "slect", "select"),
        ({"capacity": {"facto": 1.0}}, "facto", "factor"),
        ({"routr": {"select": 1}}, "routr", "router"),
    ],
)
def test_a_misspelt_key_of_an_override_is_told(change: Any, wrong: str, right: str) -> None:
    moe = mixture({"select": 2}, capacity=1.0, overrides=[{"layers": [1], **change}])
    with pytest.raises(SpecError, match=f"no key '{wrong}' here; did you mean '{right}'"):
        moegen.load(spec("misspelt", {"moe": moe}))


def test_a_token_uses_the_inner_routers_of_its_experts_alone() -> None:
    experts = {"count": 4, "width": 16, "nested": {"count": 2, "router": {"select": 1}}}
    plan = planned(spec("inner", {"moe": mixture({"select": 1}, experts=experts)}))
    total, active, _ = plan.root.totals()["router"]
    outer, inner = 2 * 4 * 32, 2 * 4 * 2 * 32
    assert (total, active) == (outer + inner, outer + inner // 4)
