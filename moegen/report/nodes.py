"""What a report or a drawing tells of one node: what it computes, its value, what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from moegen.emit.expression import ATOM, Printer, Text
from moegen.graph import meta
from moegen.graph.component import Component
from moegen.passes.cost import Costs


Names = dict[fx.Node, str]


@dataclass(frozen=True)
class NodeFacts:
    """Of one node: FLOPs and saved bytes are None where nothing is computed."""

    flops: int | None = None
    saved: int | None = None


def costs(component: Component, program: str) -> dict[fx.Node, NodeFacts]:
    """Costs of a program's nodes; a call of a child costs what the child's program does."""
    nodes = list(component.programs[program].graph.nodes)
    if any(meta.VAL not in node.meta for node in nodes if node.op != "output"):
        return {}  # never run at this workload
    summed = Costs()
    summed.of(component, program)
    found = {}
    for node in nodes:
        if node.op == "call_module":
            below = summed.of(component.children[str(node.target)], meta.method(node))
            found[node] = NodeFacts(sum(below.flops.values()), below.saved)
        elif meta.COST in node.meta:
            cost = node.meta[meta.COST]
            found[node] = NodeFacts(cost.flops, cost.saved)
    return found


def operation(node: fx.Node) -> str:
    """The name of what a node computes: linear, top_k, attention()."""
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return "parameter"
    if node.op == "call_module":
        method = meta.method(node)
        return f"{node.target}{'' if method == 'forward' else '.' + method}()"
    target: Any = node.target
    return str(target if isinstance(target, str) else getattr(target, "__name__", target))


def expression(node: fx.Node, names: Names) -> str:
    """The statement's right side, with the inputs by name, as the emitted class would say it."""
    if node.op in ("placeholder", "get_attr", "output"):
        return operation(node)
    return Printer(lambda other: Text(names[other], ATOM)).node(node).code


def name_all(graph: fx.Graph) -> Names:
    """A name for each node: its author's, numbered where it is given again, else fx's."""
    taken: set[str] = set()
    names: Names = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            names[node] = f"self.{node.target}"
            continue
        wanted = str(node.target) if node.op == "placeholder" else meta.name(node) or node.name
        name, count = wanted, 2
        while name in taken:
            name, count = f"{wanted}_{count}", count + 1
        taken.add(name)
        names[node] = name
    return names


def shape(value: Any) -> str:
    """[1, 256, 128] for a tensor; a structure by its parts' number, a number as it is."""
    if isinstance(value, Tensor):
        return f"[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value).__name__
    if isinstance(value, (tuple, list)) and any(map(_is_structure, value)):
        return f"{len(value)} values"
    return "" if value is None else str(value)


def dtype(value: Any) -> str:
    """float32 of a tensor; empty for anything else."""
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""


def value(node: fx.Node) -> Any:
    """The node's fake value, None if it was never run."""
    return node.meta.get(meta.VAL)


def _is_structure(part: Any) -> bool:
    return isinstance(part, (Tensor, tuple, list, dict))
