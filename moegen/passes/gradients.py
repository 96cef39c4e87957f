"""Tells which values of a program need a gradient, given which of its inputs do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from moegen.graph import meta
from moegen.graph.component import Component

# Inputs of a program that need a gradient: names of placeholders, and of records' fields as
# `context.memory`.
Inputs = frozenset[str]

_FRESH = {"new_ones", "new_zeros"}  # take a format and a device from a tensor, and no values


def floating_inputs(component: Component, program: str) -> Inputs:
    """Every input that is a tensor which could have a gradient; of records, none."""
    holders = (n for n in component.programs[program].graph.nodes if n.op == "placeholder")
    return frozenset(n.name for n in holders if _floats(n.meta.get(meta.VAL)))


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def needed(
    component: Component,
    nodes: Sequence[fx.Node],
    inputs: Inputs,
    called: Callable[[fx.Node, Inputs], bool],
) -> dict[fx.Node, bool]:
    """Which values need a gradient: those computed from trained parameters, or from such inputs.

    called: whether the result of a call does, from the inputs of the child that do.
    """
    out: dict[fx.Node, bool] = {}
    for node in nodes:
        value = node.meta.get(meta.VAL)
        if node.op == "placeholder":
            out[node] = any(name.partition(".")[0] == node.name for name in inputs)
        elif node.op == "get_attr":
            weight = component.weights.get(str(node.target))
            out[node] = weight is not None and weight.trained
        elif node.op == "call_module":
            out[node] = called(node, passed(component, node, out, inputs))
        elif node.target is getattr:
            out[node] = _may_flow(value) and _field(node, out, inputs)
        elif node.target in _FRESH:
            out[node] = False
        else:
            out[node] = _may_flow(value) and any(out[n] for n in node.all_input_nodes)
    return out


def passed(
    component: Component, node: fx.Node, grads: dict[fx.Node, bool], inputs: Inputs
) -> Inputs:
    """The inputs of a child that need a gradient in a call of it."""
    child = component.children[str(node.target)]
    graph = child.programs[meta.method(node)].graph
    holders = (n for n in graph.nodes if n.op == "placeholder")
    found: set[str] = set()
    for holder, given in zip(holders, node.args, strict=True):
        if not isinstance(given, fx.Node) or not grads[given]:
            continue
        for name, value in _parts(holder.name, meta.val(given)):
            field = name.partition(".")[2]
            if _floats(value):
                needs = _of_record(given, field, grads, inputs) if field else True
                found |= {name} if needs else set()
    return frozenset(found)


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value under its name, or the fields of a record under theirs."""
    if hasattr(value, "_fields"):
        yield from ((f"{name}.{field}", getattr(value, field)) for field in value._fields)
    else:
        yield name, value


def _field(node: fx.Node, grads: dict[fx.Node, bool], inputs: Inputs) -> bool:
    """Whether a field that is read off a record needs a gradient."""
    source: Any = node.args[0]
    return grads[source] and _of_record(source, str(node.args[1]), grads, inputs)


def _of_record(source: fx.Node, name: str, grads: dict[fx.Node, bool], inputs: Inputs) -> bool:
    if source.op == "placeholder":
        return f"{source.name}.{name}" in inputs or source.name in inputs
    made = source.kwargs.get(name) if hasattr(source.target, "_fields") else None
    return grads[made] if isinstance(made, fx.Node) else made is None


def _may_flow(value: Any) -> bool:
    """Whether a value holds a floating-point tensor."""
    if isinstance(value, Tensor):
        return value.is_floating_point()
    if isinstance(value, dict):
        return any(map(_may_flow, value.values()))
    return isinstance(value, (tuple, list)) and any(map(_may_flow, value))
