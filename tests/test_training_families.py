"""Training policies hold for models of every kind: they go by what parameters are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counted_flops import counter, declared
from image_specs import VISION, images
from sequence_specs import SPECS as SEQUENCES
from tiny_models import made, planned, token_ids
from vector_specs import MIXTURES, batch_of

from moegen.arch.parts import PARTS, part_of, spread
from moegen.arch.phase import in_phase
from moegen.arch.train import Train

IMAGES = {"vit": VISION["vit"], "vmoe": VISION["vmoe"]}
PAIRS = {name: SEQUENCES[name] for name in ("t5-like", "switch-like")}
ALL = {**IMAGES, **PAIRS, **{name: MIXTURES[name] for name in sorted(MIXTURES)[:4]}}


def inputs(name: str) -> tuple[Any, ...]:
    if name in IMAGES:
        return (images(name, 2),)
    if name in PAIRS:
        return token_ids(length=12), token_ids(length=9)
    return (batch_of(ALL[name])[0],)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_is_in_one_group(name: str) -> None:
    model, plan = made(ALL[name]), planned(ALL[name])
    groups = model.parameter_groups(1.0)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    roles = {part_of(role) for role in plan.root.totals()}
    assert {group["name"] for group in groups} == roles


@pytest.mark.parametrize("part", ["embedding", "attention", "norms", "dense", "moe"])
@pytest.mark.parametrize("name", [*IMAGES, *PAIRS])
def test_frozen_parts_have_no_gradient_and_cost_none(name: str, part: str) -> None:
    source = {**ALL[name], "train": {"freeze": [part]}}
    model, plan = made(source).train(), planned(source)
    frozen = spread([part])  # type: ignore[list-item]
    for group in model.parameter_groups(1.0):
        assert group["name"] not in frozen
    counts = plan.root.totals()
    still = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert still == sum(n for role, (n, _, _) in counts.items() if part_of(role) in frozen)
    with counter() as backward:
        model(*inputs(name))[0].float().square().mean().backward()
    whole = planned(ALL[name])
    spared = declared(whole.costs["forward"])[1] - declared(plan.costs["forward"])[1]
    assert backward.get_total_flops() == torch_counts(name) - spared


def torch_counts(name: str) -> int:
    """What torch counts of the backward pass where nothing is frozen."""
    with counter() as backward:
        made(ALL[name]).train()(*inputs(name))[0].float().square().mean().backward()
    return int(backward.get_total_flops())


def test_a_phase_reaches_the_mixtures_of_every_kind() -> None:
    for name, source in ALL.items():
        model = planned(source).spec.model
        routed = [one.moe for one in in_phase(model, Train(losses="none")).routed()]
        assert all(not moe.losses for moe in routed), name


def test_words_for_parts_are_their_roles() -> None:
    assert [part_of(part) for part in PARTS if part not in ("experts", "shared")] == [
        part for part in PARTS if part not in ("experts", "shared")
    ]
    assert (part_of("routed_experts"), part_of("shared_experts")) == ("experts", "shared")
    assert spread(["moe", "non_moe"]) == set(PARTS)
    assert not spread(["moe"]) & spread(["non_moe"])


def test_outputs_of_experts_are_masked_in_every_stack() -> None:
    name = "vmoe"
    masked = {**ALL[name], "train": {"masking": 0.5}}
    model, plain = made(masked), made(ALL[name])
    assert torch.equal(model.eval()(*inputs(name))[0], plain.eval()(*inputs(name))[0])
    assert not torch.equal(model.train()(*inputs(name))[0], plain.train()(*inputs(name))[0])
