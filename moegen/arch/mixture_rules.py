"""What the parts of a mixture need of each other, where no part knows it alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moegen.spec.element import Path

if TYPE_CHECKING:
    from moegen.arch.moe import MoE


def of_capacity(moe: MoE) -> Iterator[tuple[Path, str]]:
    """Capacity and groups, where selection knows them."""
    select = moe.router.select
    kind = "run" if isinstance(moe.group, int) else moe.group
    if moe.group_kind not in select.takes_groups and "group" in moe.model_fields_set:
        known = " or ".join(select.takes_groups)
        yield ("group",), f"under {select.kind} tokens compete by {known}, not by {kind}"
    second = getattr(select, "second", None)
    if moe.capacity is None:
        if second is not None and second.takes_slot:
            path = ("router", "select", "second", "takes_slot")
            yield path, "there is no capacity, so nothing takes up a slot"
        if moe.router.gate.after_drop and not (second is not None and second.skips):
            yield ("router", "gate", "after_drop"), "there is no capacity, so nothing is dropped"
        return
    if not select.takes_capacity:
        verb = "fills every expert equally" if select.kind != "all" else "uses every expert"
        yield ("capacity",), f"{select.kind} {verb} and has no capacity"
        return
    skips = second is not None and second.skips
    for below, sentence in moe.capacity.check(moe.num_experts, moe.chosen, skips):
        yield ("capacity", *below), sentence
    if moe.experts.free and (moe.capacity.overflow != "drop" or moe.capacity.devices):
        yield ("capacity",), "experts without parameters are for overflow: drop, by expert"


def of_experts(moe: MoE) -> Iterator[tuple[Path, str]]:
    """What some experts do not go with."""
    experts, select = moe.experts, moe.router.select
    if experts.free and (not select.tokens_choose or select.kind == "all"):
        yield ("experts",), f"experts without parameters are for top_k, not {select.kind}"
    if experts.free and moe.router.gate.blend:
        yield ("experts",), "with blend the token itself is added already"
    if experts.nested is None:
        return
    for name in ("balance_bias",):
        if getattr(moe.router, name):
            yield ("router", name), f"{name} knows no mixtures inside experts"
    if moe.granularity > 1:
        yield ("granularity",), "granularity is for experts that are networks, not mixtures"
    if not select.tokens_choose:
        yield ("experts", "nested"), f"mixtures inside experts are not for {select.kind}"
    if experts.free:
        yield ("experts", "nested"), "experts without parameters hold no mixtures"


SILENCE = "moe.non_causal: accept says that this is meant"


def leaks(moe: MoE) -> Iterator[tuple[Path, str]]:
    """What makes a token's routing depend on later ones, which decoding does not have yet."""
    router, capacity = moe.router, moe.capacity
    select = router.select
    otherwise = "so losses are too low, and step() routes otherwise"
    if not select.causal:
        what = {
            "balanced": "balanced assigns all tokens of a batch at once in training",
            "soft": "soft mixes all tokens of a sequence, later ones too",
        }.get(select.kind, f"{select.kind} looks at later tokens, which decoding does not have yet")
        yield ("router", "select"), f"{what}, {otherwise}"
    if not router.input.causal:
        what = f"router input {router.input.kind} is a mean over later tokens too"
        yield ("router", "input"), f"{what}, {otherwise}"
    leak = capacity.leak(moe.chosen) if capacity else None
    if capacity and leak:
        at = "overflow" if capacity.priority == "rank" else "priority"
        at = at if at in capacity.model_fields_set else ""
        yield ("capacity", *([at] if at else [])), f"{leak}, {otherwise}"
