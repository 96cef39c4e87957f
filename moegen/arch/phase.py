"""Phases of training: a model as its routed layers are in the phase that `train` describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moegen.arch.capacity import Capacity
from moegen.arch.moe import MoE, Override
from moegen.arch.train import PhaseCapacity, Train
from moegen.spec.element import Element

Change = Callable[[MoE], MoE]


def in_phase(model: Any, train: Train) -> Any:
    """A model, or any part of one, whose routed layers have the losses and capacity of a phase."""
    if train.losses == "all" and train.capacity is None:
        return model
    return _changed(model, lambda moe: _moe(moe, train))


def _changed(value: Any, change: Change) -> Any:
    """A value with every mixture in it changed; the value itself if it holds none."""
    if isinstance(value, MoE):
        return change(value)
    if isinstance(value, Element):
        old = {name: getattr(value, name) for name in type(value).model_fields}
        new = {name: _changed(part, change) for name, part in old.items()}
        other = {name: part for name, part in new.items() if part is not old[name]}
        return value.model_copy(update=other) if other else value
    if isinstance(value, dict):
        made = {name: _changed(part, change) for name, part in value.items()}
        return made if any(made[name] is not value[name] for name in value) else value
    if isinstance(value, tuple):
        parts = tuple(_changed(part, change) for part in value)
        return parts if any(a is not b for a, b in zip(parts, value, strict=True)) else value
    return value


def _moe(moe: MoE, train: Train) -> MoE:
    changes: dict[str, Any] = {}
    if train.losses != "all":
        on = () if train.losses == "none" else train.losses
        changes["losses"] = {name: loss for name, loss in moe.losses.items() if name in on}
    if train.capacity is not None:
        if moe.capacity is not None:
            changes["capacity"] = _capacity(moe.capacity, train.capacity)
        changes["overrides"] = tuple(_override(o, train.capacity) for o in moe.overrides)
    return moe.model_copy(update=changes)


def _capacity(capacity: Capacity, phase: PhaseCapacity) -> Capacity:
    """A capacity with the factors of a phase."""
    said = capacity.model_dump(exclude_unset=True)
    if phase.eval_factor is not None:
        said.pop("eval_share", None)
    return Capacity.model_validate({**said, **phase.model_dump(exclude_none=True)})


def _override(override: Override, phase: PhaseCapacity) -> Override:
    """Another mixture in some layers, whose capacity, if it says one, is the phase's too."""
    said = (override.model_extra or {}).get("capacity")
    if said in (None, "none"):
        return override
    given = said if isinstance(said, dict) else {"factor": said}
    other = {**given, **phase.model_dump(exclude_none=True)}
    if phase.eval_factor is not None:
        other.pop("eval_share", None)
    return Override.model_validate({**override.model_dump(), "capacity": other})
