"""Type annotations of values, from what they are in the graph."""

from __future__ import annotations

from typing import Any

from torch import SymInt, Tensor, fx

from moegen.graph import meta


def annotation(value: Any) -> str:
    """The annotation of a value: `Tensor`, a record's name, or a structure of them."""
    if isinstance(value, Tensor):
        return "Tensor"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value).__name__
    if isinstance(value, tuple):
        return _tuple(value)
    if isinstance(value, list):
        return f"list[{annotation(value[0]) if value else 'Tensor'}]"
    if isinstance(value, dict):
        inner = {annotation(v) for v in value.values()} or {"Tensor"}
        return f"dict[str, {' | '.join(sorted(inner))}]"
    if value is None:
        return "None"
    if isinstance(value, SymInt):
        return "int"
    return type(value).__name__


def _tuple(value: tuple[Any, ...]) -> str:
    inner = [annotation(v) for v in value]
    if inner and len(set(inner)) == 1 and inner[0] != "Tensor":
        return f"tuple[{inner[0]}, ...]"
    if len(set(inner)) > 1 and all(_of_tensors(v) for v in value):
        return "tuple[tuple[Tensor, ...], ...]"
    return f"tuple[{', '.join(inner)}]" if inner else "tuple[()]"


def _of_tensors(value: Any) -> bool:
    """Whether it is a plain tuple of tensors, of any number."""
    plain = isinstance(value, tuple) and not hasattr(value, "_fields")
    return plain and all(isinstance(v, Tensor) for v in value)


def of_output(graph: fx.Graph) -> str:
    """The annotation of what a program returns."""
    last = next(iter(reversed(graph.nodes)))
    result = last.args[0]
    if result is None:
        return "None"
    return annotation(fx.node.map_arg(result, meta.val))
