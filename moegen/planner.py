"""Plans: a validated spec lowered to components whose every value is known in shape and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from moegen.arch.spec import Spec
from moegen.errors import Mark, PlanError, Problem
from moegen.graph.builder import Trace
from moegen.graph.component import Component
from moegen.graph.fault import Fault
from moegen.graph.verify import verify
from moegen.passes.cost import Costs, Summary
from moegen.passes.fuse import Fusion, fuse
from moegen.passes.shapes import Shapes
from moegen.spec.element import Path
from moegen.spec.load import Loaded
from moegen.spec.source import locate


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
    costs: Mapping[str, Summary]
    marks: Mapping[Path, Mark] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    fusions: tuple[Fusion, ...] = ()

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What is allowed but seldom meant, each with its place."""
        idle = self.spec.train.idle(self.root.totals())
        found = (*self.spec.warnings(), *((("train", *path), said) for path, said in idle))
        return tuple(Problem(text, self.mark(path), path) for path, text in found)

    def mark(self, path: Path) -> Mark | None:
        """The line of the spec for a path, or for what encloses it."""
        return locate(self.marks, path)

    @property
    def components(self) -> list[Component]:
        """Every distinct component, children first."""
        return self.root.distinct()


def lower(loaded: Loaded[Spec], workload: Workload, fusions: tuple[Fusion, ...] = ()) -> Plan:
    """Trace a spec, apply a backend's fusions, and run every program on fake tensors."""
    spec, marks = loaded.spec, loaded.marks
    trace = Trace(spec)
    try:
        root = trace.root()
        for path, sentence in spec.train.broken(root.totals()):
            raise PlanError(Problem(sentence, locate(marks, ("train", *path)), ("train", *path)))
        mode = FakeTensorMode()
        results: dict[str, Any] = {}
        costs: dict[str, Summary] = {}
        verify(root)
        fuse(root, fusions)
        verify(root)
        for program, inputs in spec.model.examples(workload.batch, workload.sequence).items():
            if program in root.programs:
                with mode:
                    example = inputs(results)
                results[program] = Shapes(mode).run(root, program, example)
                verify(root, program)
                given = frozenset[str]() if program == "forward" else None  # data has no gradient
                costs[program] = Costs().of(root, program, given)
                if program == "forward":
                    again = Costs(("layers",)).of(root, program, given)
                    costs["forward, checkpointed"] = again
    except Fault as error:
        raise PlanError(_problem(error, marks)) from error
    return Plan(spec, root, workload, trace.records, results, costs, marks, loaded.data, fusions)


def _problem(error: Fault, marks: Mapping[Path, Mark]) -> Problem:
    """The error at the line of the innermost section that the spec has."""
    note = f"traced at {error.traced_at}" if error.traced_at else None
    return Problem(str(error), mark=locate(marks, error.path), path=error.path, note=note)
