"""What may stand in a component's graph; checked after tracing and between any two passes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from moegen.graph import meta
from moegen.graph.builder import has_effect
from moegen.graph.component import Component
from moegen.graph.functions import is_torch_function
from moegen.ops.op import op_of

_OPERATORS = {getattr(operator, name) for name in dir(operator) if not name.startswith("_")}
_WORDS = {operator.and_, operator.or_, operator.not_, operator.is_}  # keywords of Python


def verify(root: Component, program: str | None = None) -> None:
    """Check every graph; with a program, also that all it reaches has values.

    Raises AssertionError: a broken graph is a fault of an element or a pass, not of a spec.
    """
    for component in root.distinct():
        for name, module in component.programs.items():
            for node in module.graph.nodes:
                for rule in RULES:
                    broken = rule(component, module.graph, node)
                    place = f"{component.class_name}.{name}: {node}"
                    assert broken is None, f"{place}: {broken}{_source(node)}"
    if program is not None:
        for node in root.programs[program].graph.nodes:
            assert node.op == "output" or meta.VAL in node.meta, f"{node} has no value"


def _source(node: fx.Node) -> str:
    """The author's line, if it is known."""
    line = node.meta[meta.ORIGIN].traced_at if meta.ORIGIN in node.meta else ""
    return f" (traced at {line})" if line else ""


def _order(component: Component, graph: fx.Graph, node: fx.Node) -> str | None:
    early = [n for n in node.all_input_nodes if not n < node]
    return f"reads {early[0]} before it is made" if early else None


def _origin(component: Component, graph: fx.Graph, node: fx.Node) -> str | None:
    return None if meta.ORIGIN in node.meta else "has no origin"


def _dead(component: Component, graph: fx.Graph, node: fx.Node) -> str | None:
    alive = node.op in ("placeholder", "output", "call_module") or node.users or has_effect(node)
    return None if alive else "is dead"


def _target(component: Component, graph: fx.Graph, node: fx.Node) -> str | None:
    return TARGETS[node.op](component, node)


def _any(component: Component, node: fx.Node) -> str | None:
    return None


def _attribute(component: Component, node: fx.Node) -> str | None:
    name = str(node.target)
    own = name in component.weights or name in component.buffers or name == "training"
    return None if own else f"reads {name}, which is no parameter or buffer of this component"


def _child(component: Component, node: fx.Node) -> str | None:
    child = component.children.get(str(node.target))
    if child is None:
        return f"calls {node.target}, which is no child"
    method = meta.method(node)
    return None if method in child.programs else f"calls {method}, which {node.target} lacks"


def _method(component: Component, node: fx.Node) -> str | None:
    name = str(node.target)
    if name.endswith("_"):
        return f"calls {name}, which works in place"
    return None if hasattr(Tensor, name) else f"calls {name}, which tensors lack"


def _function(component: Component, node: fx.Node) -> str | None:
    target: Any = node.target
    record = hasattr(target, "_fields")
    known = op_of(target) or target in _OPERATORS or target in (getattr, tuple) or record
    if not known and not is_torch_function(target):
        return f"calls {target}, which is neither an op nor a public torch function"
    name = getattr(target, "__name__", "")
    in_place = name.endswith("_") and target not in _WORDS
    in_place = in_place or "out" in node.kwargs or node.kwargs.get("inplace") is True
    return "works in place" if in_place and op_of(target) is None else None


Target = Callable[[Component, fx.Node], str | None]
TARGETS: dict[str, Target] = {
    "placeholder": _any,
    "output": _any,
    "get_attr": _attribute,
    "call_module": _child,
    "call_method": _method,
    "call_function": _function,
}

RULES = (_order, _origin, _dead, _target)
