"""Turns a plain torch function into a leaf of the graph, with its cost beside it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ParamSpec, TypeVar

from torch import fx

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Op:
    """What the compiler knows of one op; the function itself is its meaning and its source.

    flops: FLOPs of the forward pass, from the arguments (one multiply-accumulate is two).
    backward: FLOPs of the backward pass over those of the forward pass; a callable gives the
        ratio from the arguments.
    shares: how much of that ratio is for the gradient of each argument, by name, from the
        arguments, so that it is not counted where the argument needs none.
    saves: names of the arguments that backward keeps, "out" for the result ("out.0" for its
        first part); a callable gives them from the arguments where they depend on these.
    extra: bytes that backward keeps beyond these, from the arguments.
    elementwise: True if each value of the result depends on the values at its place alone, so that
        a fusion may compute it on any part, or once more.
    inside: bytes that the op needs while it runs beside what is counted anyway, in the forward and
        in the backward pass, from the arguments.
    result: tensors of the result's shape, from the arguments, for plans and proofs, where running
        the op itself needs sizes as numbers.
    steps: how many of its steps must wait for each other, such as those of time, from the
        arguments.
    effect: True if the op writes to an argument or draws random numbers, so that neither its
        place nor its number of executions may change.
    """

    reference: Callable[..., Any]
    flops: Callable[..., int] | None = None
    backward: float | Callable[..., Fraction] = 2.0
    shares: Callable[..., dict[str, Fraction]] | None = None
    saves: tuple[str, ...] | Callable[..., tuple[str, ...]] = ()
    extra: Callable[..., int] | None = None
    elementwise: bool = False
    inside: Callable[..., tuple[int, int]] | None = None
    result: Callable[..., Any] | None = None
    steps: Callable[..., int] | None = None
    effect: bool = False

    @property
    def name(self) -> str:
        """The name under which models call it."""
        return self.reference.__name__


OPS: dict[str, Op] = {}


def op(**facts: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function as an op: called on proxies it becomes one node, else it just runs."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        known = Op(reference=function, **facts)
        previous = OPS.get(known.name)
        if previous is not None and not _same_place(previous.reference, function):
            raise ValueError(f"two ops are called {known.name!r}")
        OPS[known.name] = known

        @functools.wraps(function)
        def leaf(*args: P.args, **kwargs: P.kwargs) -> R:
            tracer = _tracer(args, kwargs)
            if tracer is None:
                return function(*args, **kwargs)
            proxy: Any = tracer.create_proxy("call_function", leaf, args, kwargs)
            return proxy  # type: ignore[no-any-return]

        leaf.op = known  # type: ignore[attr-defined]
        return leaf

    return register


def op_of(target: Any) -> Op | None:
    """The op behind a node's target, or None if the target is no op."""
    return getattr(target, "op", None) if callable(target) else None


def _tracer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tracer of the first proxy among the arguments, however deep, or None."""
    found: list[Any] = []

    def look(value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            found.append(value.tracer)
        return value

    fx.node.map_aggregate((args, kwargs), look)
    return found[0] if found else None


def _same_place(a: Callable[..., Any], b: Callable[..., Any]) -> bool:
    return inspect.getsourcefile(a) == inspect.getsourcefile(b)
