"""Mixtures drawn from all that elements allow are refused at a line, or they work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn_routing import drawn, wrapped

import moegen
from moegen.arch.account import accounts
from moegen.errors import Problem, SpecError
from moegen.planner import Plan

BATCH, LENGTH = 2, 6
DRAWS = 20  # in each test


def works(plan: Plan) -> None:
    """It trains, is evaluated and decodes, and all that comes out is finite."""
    torch.manual_seed(0)
    model = moegen.module(plan).Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.randint(0, 17, (BATCH, LENGTH))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, 4:] = False
    given = {name: torch.zeros(BATCH, dtype=torch.int64) for name in plan.spec.model.given()}  # type: ignore[attr-defined]
    for training in (True, False):
        model.train(training)
        loss, output = model.training_loss(ids, mask=mask, **given)
        found = [loss, *output.losses.values(), output.logits[mask]]
        if training:
            loss.backward()
            found += [parameter.grad for parameter in model.parameters()]
            if hasattr(model, "update_balance"):
                model.update_balance(output.routing)
        assert all(value is not None and torch.isfinite(value).all() for value in found)
    with torch.no_grad():
        cache = model.new_cache(BATCH, LENGTH)
        model.step(ids[:, :4], torch.tensor(0), cache, *given.values())
        logits = model.step(ids[:, 4:5], torch.tensor(4), cache, *given.values())
    assert torch.isfinite(logits).all()


def planned(spec: dict[str, Any]) -> tuple[Plan | None, tuple[Problem, ...]]:
    """Its plan, or why there is none."""
    try:
        return moegen.plan(spec, batch=BATCH, sequence=LENGTH), ()
    except SpecError as error:
        return None, error.problems


@pytest.mark.parametrize("start", range(0, 300, DRAWS))
def test_a_drawn_mixture_is_refused_or_works(start: int) -> None:
    for seed in range(start, start + DRAWS):
        plan, problems = planned(wrapped(drawn(seed)))
        assert all(problem.mark and problem.message for problem in problems)
        if plan is None:
            assert problems
            continue
        assert accounts(plan.spec, BATCH, LENGTH)
        works(plan)


def test_enough_is_accepted() -> None:
    accepted = 0
    for seed in range(300):
        try:
            moegen.load(wrapped(drawn(seed)))
        except SpecError:
            continue
        accepted += 1
    assert accepted > 30
