"""Plans: a validated spec lowered to components whose every value is known in shape and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moegen.arch.spec import Spec
from moegen.errors import Mark, PlanError, Problem
from moegen.graph.builder import Trace
from moegen.graph.component import Component
from moegen.passes.shapes import ShapeError, Shapes
from moegen.spec.element import Path


@dataclass(frozen=True)
class Workload:
    """How much a plan's numbers are for: a batch of sequences of tokens."""

    batch: int = 1
    sequence: int = 4096


@dataclass(frozen=True)
class Plan:
    """A spec, its components, and what its programs give for a workload."""

    spec: Spec
    root: Component
    workload: Workload
    records: Mapping[str, type[tuple[Any, ...]]]
    results: Mapping[str, Any]
    marks: Mapping[Path, Mark] = field(default_factory=dict)

    @property
    def components(self) -> list[Component]:
        """Every distinct component, children first."""
        return self.root.distinct()


def lower(spec: Spec, workload: Workload, marks: Mapping[Path, Mark] | None = None) -> Plan:
    """Trace a spec and run every program on fake tensors."""
    marks = marks or {}
    trace = Trace(spec)
    try:
        root = trace.component(spec.model, ("model",), "other")
        mode = FakeTensorMode()
        shapes = Shapes(mode)
        results: dict[str, Any] = {}
        for program, inputs in spec.model.examples(workload.batch, workload.sequence).items():
            if program in root.programs:
                with mode:
                    example = inputs(results)
                results[program] = shapes.run(root, program, example)
    except ShapeError as error:
        raise PlanError(_problem(error, marks)) from error
    return Plan(spec, root, workload, trace.records, results, marks)


def _problem(error: ShapeError, marks: Mapping[Path, Mark]) -> Problem:
    """The error at the line of the innermost section that the spec has."""
    path = error.path
    while path and path not in marks:
        path = path[:-1]
    note = f"traced at {error.traced_at}" if error.traced_at else None
    return Problem(str(error), mark=marks.get(path), path=path, note=note)


def default_dtype(spec: Spec) -> torch.dtype:
    """The dtype of parameters that emitted code need not name."""
    return spec.precision.parameter_dtype
