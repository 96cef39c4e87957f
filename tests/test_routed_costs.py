"""What plans of every routing policy say of FLOPs and kept memory, against what torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counted_flops import counter, declared, expected
from kept_memory import distinct_bytes, kept, own
from routing_specs import ROUTED
from tiny_models import BATCH, LENGTH, made, planned, token_ids

NAMES = sorted(ROUTED)


def given(name: str) -> dict[str, torch.Tensor]:
    """An id for every sequence, for each kind of id that the routers read."""
    return {key: torch.arange(BATCH) for key in planned(ROUTED[name]).spec.model.given()}


@pytest.mark.parametrize("name", NAMES)
def test_saved_bytes_are_what_autograd_keeps(name: str) -> None:
    model, ids, more = made(ROUTED[name]).train(), token_ids(), given(name)
    found = kept(lambda: model(ids, **more))
    mine = [*own(model, ids), *more.values()]
    assert planned(ROUTED[name]).costs["forward"].saved == distinct_bytes(found, mine)


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    model: Any = made(ROUTED[name]).train()
    with counter() as forward:
        out = model(token_ids(), **given(name))
    with counter() as backward:
        (out.logits.float().square().mean() + sum(out.losses.values())).backward()
    counts = forward.get_total_flops(), backward.get_total_flops()
    wanted = expected(planned(ROUTED[name]))
    assert counts[0] == wanted[0]
    if name == "constant-gate":  # the router has no gradient, which a plan does not know
        router = 2 * BATCH * LENGTH * 32 * 8
        assert wanted[1] - counts[1] == 2 * 2 * router
    else:
        assert counts[1] == wanted[1]


@pytest.mark.parametrize("name", NAMES)
def test_decoding_flops_are_those_that_torch_counts(name: str) -> None:
    model: Any = made(ROUTED[name]).eval()
    cache = model.new_cache(BATCH, LENGTH)
    with counter() as step, torch.no_grad():
        model.step(token_ids(length=1), torch.tensor(0), cache, **given(name))
    assert declared(planned(ROUTED[name]).costs["step"])[0] == step.get_total_flops()
