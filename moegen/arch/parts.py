"""Parts of a model, as `init` and `train` call them: what its parameters are for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

Part = Literal[
    "embedding",
    "norms",
    "attention",
    "dense",
    "recurrent",
    "router",
    "experts",
    "shared",
    "head",
    "other",
]
Parts = Literal[Part, "moe", "non_moe"]

PARTS: tuple[Part, ...] = get_args(Part)

# Roles of parameters that specs call otherwise.
_OF_ROLE: dict[str, Part] = {"routed_experts": "experts", "shared_experts": "shared"}

# Names for several parts: routed layers are their router, their experts, and those all tokens meet.
_MOE = frozenset[Part](("router", "experts", "shared"))
_SEVERAL: dict[str, frozenset[Part]] = {"moe": _MOE, "non_moe": frozenset(PARTS) - _MOE}


def part_of(role: str) -> Part:
    """The part that parameters of a role are; other for roles that specs have no word for."""
    named: Part = next((part for part in PARTS if part == role), "other")
    return _OF_ROLE.get(role, named)


def spread(words: Iterable[Parts]) -> frozenset[Part]:
    """Parts, with moe and non_moe as those that they stand for."""
    found: set[Part] = set()
    for word in words:
        found |= _SEVERAL.get(word, {part for part in PARTS if part == word})
    return frozenset(found)
