"""Loads told apart: how many choices tokens of each id, such as a modality, make of each expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moegen.arch.routing.routed import Routed
from moegen.graph.builder import Builder
from moegen.ops.routing import expert_load

if TYPE_CHECKING:
    from moegen.arch.moe import MoE


def loads_apart(
    b: Builder, moe: MoE, routed: Routed, valid: Any, ids: dict[str, Any]
) -> dict[str, Any]:
    """Loads [ids, E] by name, where the model tells them apart and a loss is given the ids."""
    name, count = b.spec.model.counted_by or ("", 0)
    read = any(name in loss.ids() for loss in moe.losses.values())
    if not read or routed.choices is None:
        return {}
    own = (valid & (ids[name] == index) for index in range(count))
    loads = [expert_load(routed.choices, moe.num_choices, tokens) for tokens in own]
    return {f"{name}_load": torch.stack(loads)}
