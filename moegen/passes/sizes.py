"""Proves that no size of the batch is baked into a program, by running it on symbols."""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.functions import Max

from moegen.errors import PlanError, Problem
from moegen.graph import meta
from moegen.graph.builder import Trace
from moegen.graph.fault import Fault
from moegen.passes.fuse import Fusion, fuse
from moegen.passes.shapes import Shapes, describe
from moegen.spec.load import Loaded

# Sizes that no spec has by chance, so that a coincidence is no equality.
BATCH, SEQUENCE = 1009, 2003
# Others, that leave other rests: what has to hold for both is no coincidence of divisibility.
AGAIN = (1022, 2014)


class _Watched(Shapes):
    """Runs programs, and notes which node first needed a size to equal a number."""

    def __init__(self, mode: FakeTensorMode, environment: ShapeEnv) -> None:
        super().__init__(mode)
        self.environment = environment
        self.seen = 0
        self.baked: list[tuple[fx.Node, str]] = []

    def done(self, node: fx.Node, value: Any) -> None:
        super().done(node, value)
        guards = self.environment.guards
        for guard in guards[self.seen :]:
            expression = guard.expr
            if isinstance(expression, sympy.Eq) and not _is_of_any(expression):
                self.baked.append((node, str(expression)))
        self.seen = len(guards)


def _is_of_any(equation: sympy.Eq) -> bool:
    """Whether it is max(1, size) = size, so of every size but none."""
    sides = (equation.lhs, equation.rhs)
    least: Any = Max
    return any(least(1, one) == other for one, other in (sides, sides[::-1]))


def prove_sizes(loaded: Loaded[Any], fusions: tuple[Fusion, ...] = ()) -> None:
    """Run training's program with symbolic batch and sequence; raises PlanError if one is baked in.

    A program is general if no equation between a size and a number had to hold on the way.
    """
    baked = _baked(loaded, fusions, (BATCH, SEQUENCE))
    if not baked:
        return
    try:
        places = {(p.path, p.note) for p in _baked(loaded, fusions, AGAIN)}
    except PlanError:
        places = {(p.path, p.note) for p in baked}  # other sizes do not even fit
    always = tuple(p for p in baked if (p.path, p.note) in places)
    if always:
        raise PlanError(always)


def _baked(
    loaded: Loaded[Any], fusions: tuple[Fusion, ...], sizes: tuple[int, int]
) -> tuple[Problem, ...]:
    """What has to hold of the symbols for these sizes; raises PlanError if they do not fit."""
    root = Trace(loaded.spec).root()
    fuse(root, fusions)
    environment = ShapeEnv(duck_shape=False, specialize_zero_one=True)
    mode = FakeTensorMode(shape_env=environment)
    shapes = _Watched(mode, environment)
    try:
        ids = _symbolic(mode, sizes)
        with mode:
            inputs = loaded.spec.model.examples(*ids.shape)["forward"]({})
        with enable_python_dispatcher():  # else torch 2.11 asks in C++ for sizes as numbers
            shapes.run(root, "forward", inputs)
    except Fault as fault:
        note = f"traced at {fault.traced_at}"
        raise PlanError(loaded.problem(fault.path, str(fault), note=note)) from fault
    return tuple(_problem(loaded, node, why) for node, why in shapes.baked)


def _symbolic(mode: FakeTensorMode, sizes: tuple[int, int]) -> Tensor:
    """Token ids of symbolic shape."""
    ids = torch.empty(sizes, dtype=torch.int64, device="meta").to("meta")
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    made = mode.from_tensor(ids, symbolic_context=context)
    with mode:
        return torch.zeros(made.shape, dtype=torch.int64)


def _problem(loaded: Loaded[Any], node: fx.Node, why: str) -> Problem:
    origin = meta.origin(node)
    sentence = f"the size of a batch is baked in: {why} must hold for [{describe(node)}]"
    return loaded.problem(origin.path, sentence, note=f"traced at {origin.traced_at}")
