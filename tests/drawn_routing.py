"""Random mixtures of all families' kinds and options, drawn by the fields of the elements."""

from __future__ import annotations

import random
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from tiny_specs import spec

from moegen.arch.moe import MoE
from moegen.report.vocabulary import kind_of
from moegen.spec.element import Element, OneOf
from moegen.spec.shape import Slot, slots_of

NAMES = ("task", "modality", "token")
WHOLE = (1, 2, 3, 4, 6, 8)
NUMBERS = (0.01, 0.25, 0.5, 1.0, 1.5, 2.0)
LEFT_OUT = {"overrides", "placement", "non_causal", "kind"}
# A section that is seldom there leaves more of the others accepted.
CHANCE = {"experts": 1.0, "router": 1.0, "select": 0.9, "capacity": 0.4, "losses": 0.4}
LIKELY = {
    ("experts", "count"): (4, 8),
    ("experts", "width"): (8,),
    ("granularity",): (1, 2),
    ("k",): (1, 1, 2, 2, 3),
}


def drawn(seed: int) -> dict[str, Any]:
    """The `moe` section of a spec, valid by its fields but perhaps not by its rules."""
    chance = random.Random(seed)
    made = _element(MoE, chance, ())
    made["experts"] = {**made["experts"], "count": chance.choice((4, 8)), "width": 8}
    return made


def wrapped(moe: dict[str, Any]) -> dict[str, Any]:
    """A tiny decoder around it."""
    model = {"layers": 1, "d_model": 8, "attention": {"heads": 2}, "vocab_size": 17}
    return spec("drawn", {**model, "moe": moe})


def _element(element: type[Element], chance: random.Random, path: tuple[str, ...]) -> Any:
    made: dict[str, Any] = {}
    for name, info in element.model_fields.items():
        often = CHANCE.get(name, 0.3 / (1 + 0.3 * len(path)))
        if name in LEFT_OUT or not (info.is_required() or chance.random() < often):
            continue
        slots = slots_of(info.annotation, info.metadata)
        made[name] = _value(chance.choice(slots), chance, (*path, name))
    kind = kind_of(element)
    return {"kind": kind, **made} if kind else made


def _value(slot: Slot, chance: random.Random, path: tuple[str, ...]) -> Any:
    kind = slot.type
    if path[-2:] in LIKELY or path[-1:] in LIKELY:
        return chance.choice(LIKELY.get(path[-2:]) or LIKELY[path[-1:]])
    if isinstance(kind, OneOf):
        return _element(chance.choice(list(kind.family.members.values())), chance, path)
    if isinstance(kind, type) and issubclass(kind, Element):
        return _element(kind, chance, path)
    if get_origin(kind) is Literal:
        return chance.choice(get_args(kind))
    if kind is bool:
        return True
    if kind is NoneType:
        return None
    if kind is str:
        return chance.choice(NAMES)
    if kind in (int, float):
        numbers = [n for n in (WHOLE if kind is int else NUMBERS) if _allowed(n, slot)]
        return chance.choice(numbers or [1])
    if get_origin(kind) is tuple:
        return chance.choice(([4, 4], [2, 2], [3, 5], [8]))
    return _losses(chance, path)


def _losses(chance: random.Random, path: tuple[str, ...]) -> dict[str, Any]:
    from moegen.arch.losses.auxiliary import AuxiliaryLoss

    members = AuxiliaryLoss.members
    picked = chance.sample(sorted(members), chance.choice((1, 1, 2)))
    return {name: _element(members[name], chance, (*path, name)) for name in picked}


def _allowed(number: float, slot: Slot) -> bool:
    for limit in slot.limits:
        low, high = getattr(limit, "ge", None), getattr(limit, "le", None)
        above, below = getattr(limit, "gt", None), getattr(limit, "lt", None)
        if (low is not None and number < low) or (high is not None and number > high):
            return False
        if (above is not None and number <= above) or (below is not None and number >= below):
            return False
    return True
