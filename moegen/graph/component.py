"""Components: one traced element each, which is one class of the emitted model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from moegen.ops.op import OPS
from moegen.spec.element import Path

if TYPE_CHECKING:
    from moegen.graph.layer import Layer


@dataclass(frozen=True)
class Init:
    """How a parameter starts: an op, or a function of `torch.nn.init`, and keyword arguments.

    identical: only the first matrix of a stack is drawn, and the others are copies of it.
    """

    function: str
    arguments: tuple[tuple[str, float], ...] = ()
    identical: bool = False

    def start(self, weight: Tensor) -> None:
        """Fill a parameter as emitted models do."""
        op = OPS.get(self.function)
        fill = op.reference if op else getattr(nn.init, self.function)
        fill(weight[0] if self.identical else weight, **dict(self.arguments))
        if self.identical:
            weight[1:] = weight[0]


@dataclass(frozen=True)
class Weight:
    """A parameter: shape, dtype, what it is for, and how it starts.

    active: the fraction of it that one token uses; less than 1 for routed experts only.
    trained: whether this phase of training moves it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str
    init: Init
    active: Fraction = Fraction(1)
    trained: bool = True

    @property
    def count(self) -> int:
        """Number of values."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class Buffer:
    """A tensor that is no parameter: the call that makes it, and whether checkpoints hold it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[..., torch.Tensor]
    arguments: tuple[tuple[str, Any], ...] = ()
    persistent: bool = False


@dataclass(eq=False)
class Component:
    """The programs of one element, with the parameters and children that they share."""

    element: Layer
    class_name: str
    path: Path
    role: str
    weights: dict[str, Weight] = field(default_factory=dict)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    children: dict[str, Component] = field(default_factory=dict)
    programs: dict[str, fx.GraphModule] = field(default_factory=dict)

    def walk(self) -> Iterator[tuple[str, Component]]:
        """Every call site below, itself first, as (dotted name, component)."""
        yield "", self
        for name, child in self.children.items():
            for below, component in child.walk():
                yield f"{name}.{below}" if below else name, component

    def distinct(self) -> list[Component]:
        """Every distinct component below and including this one, children first."""
        found: dict[int, Component] = {}

        def visit(component: Component) -> None:
            if id(component) in found:
                return
            for child in component.children.values():
                visit(child)
            found[id(component)] = component

        visit(self)
        return list(found.values())

    def totals(self) -> dict[str, tuple[int, int, int]]:
        """Parameters by role as (count, active count, bytes), over all call sites below."""
        return {role: (n, int(a), size) for role, (n, a, size) in self._totals({}).items()}

    def _totals(self, memo: dict[int, Any]) -> dict[str, tuple[int, Fraction, int]]:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        sums: dict[str, tuple[int, Fraction, int]] = {}

        def add(role: str, more: tuple[int, Fraction, int]) -> None:
            old = sums.get(role, (0, Fraction(0), 0))
            sums[role] = (old[0] + more[0], old[1] + more[1], old[2] + more[2])

        for weight in self.weights.values():
            add(weight.role, (weight.count, weight.count * weight.active, weight.bytes))
        for child in self.children.values():
            for role, more in child._totals(memo).items():
                add(role, more)
        memo[id(self)] = sums
        return sums


def attach(root: nn.Module, name: str, child: nn.Module) -> None:
    """Add a submodule under a dotted name such as "layers.3"."""
    *parents, leaf = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(leaf, child)
