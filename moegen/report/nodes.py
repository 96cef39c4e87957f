"""What a report or a drawing tells of one node: what it computes, its value, what it costs."""

from __future__ import annotations

import operator
from collections.abc import Mapping
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


@dataclass(frozen=True)
class ProgramFacts:
    """Of one program: its nodes' costs, and their sum, in which a kept tensor counts once."""

    nodes: Mapping[fx.Node, NodeFacts]
    total: NodeFacts


def costs(component: Component, program: str) -> ProgramFacts:
    """Costs of a program; a call of a child costs what the child's program does."""
    nodes = list(component.programs[program].graph.nodes)
    if any(meta.VAL not in node.meta for node in nodes if node.op != "output"):
        return ProgramFacts({}, NodeFacts())  # never run at this workload
    summed = Costs()
    whole = summed.of(component, program)
    found = {}
    for node in nodes:
        if node.op == "call_module":
            below = summed.of(component.children[str(node.target)], meta.method(node))
            found[node] = NodeFacts(sum(below.flops.values()), below.saved)
        elif meta.COST in node.meta:
            cost = node.meta[meta.COST]
            found[node] = NodeFacts(cost.flops, cost.saved)
    return ProgramFacts(found, NodeFacts(sum(whole.flops.values()), whole.saved))


def operation(component: Component, node: fx.Node) -> str:
    """The name of what a node computes: linear, top_k, attention()."""
    target: Any = node.target
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        kinds: dict[str, Any] = {"parameter": component.weights, "buffer": component.buffers}
        return next((kind for kind, known in kinds.items() if target in known), "flag")
    if node.op == "call_module":
        method = meta.method(node)
        return f"{target}{'' if method == 'forward' else '.' + method}()"
    return str(target if isinstance(target, str) else getattr(target, "__name__", target))


def expression(component: Component, node: fx.Node, names: Names) -> str:
    """The statement's right side, with the inputs by name, as the emitted class says it."""
    if node.op in ("placeholder", "get_attr"):
        return operation(component, node)

    def spell(other: fx.Node) -> Text:
        hidden = is_access(other, named=True)
        return printer.node(other) if hidden else Text(names[other], ATOM)

    printer = Printer(spell)
    return printer.node(node).code


def is_access(node: fx.Node, *, named: bool = False) -> bool:
    """Whether a node only reads a field or a part of another; with named, and has no name."""
    if named and (meta.name(node) or meta.PART in node.meta):
        return False
    if node.target is getattr:
        return True
    return node.target is operator.getitem and isinstance(node.args[1], (int, str))


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
    """[1, 256, 128] for a tensor; a record by its class, other structures by their length."""
    if isinstance(value, Tensor):
        return f"[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value).__name__
    if isinstance(value, (tuple, list)) and any(map(_is_structure, value)):
        return f"tuple of {len(value)}"
    return "" if value is None else str(value)


def dtype(value: Any) -> str:
    """fp32, bf16 or int64 of a tensor; empty for anything else."""
    if not isinstance(value, Tensor):
        return ""
    name = str(value.dtype).removeprefix("torch.")
    return name.replace("bfloat", "bf").replace("float", "fp")


def value(node: fx.Node) -> Any:
    """The node's fake value, None if it was never run."""
    return node.meta.get(meta.VAL)


def _is_structure(part: Any) -> bool:
    return isinstance(part, (Tensor, tuple, list, dict))
