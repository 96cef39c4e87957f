"""Draws a plan, or one program of a component, as boxes and arrows."""

from __future__ import annotations

import operator
from itertools import pairwise

from torch import fx

from moegen.choices import choose
from moegen.draw import Arrow, Box, Picture, Shape
from moegen.emit.words import ranges
from moegen.graph import meta
from moegen.graph.component import Component
from moegen.planner import Plan
from moegen.report import nodes as facts
from moegen.report import numbers
from moegen.report.overview import parameters

_SHAPES: dict[str, Shape] = {
    "placeholder": "round",
    "output": "round",
    "get_attr": "parameter",
    "call_module": "call",
}


def of_component(component: Component, program: str) -> Picture:
    """One program: a box for each value; fields and parts are labels of arrows."""
    choose(f"program of {component.class_name}", program, component.programs)
    graph = component.programs[program].graph
    names = facts.name_all(graph)
    made = Picture(f"{component.class_name}.{program}")
    shown = {n: f"n{i}" for i, n in enumerate(graph.nodes) if not _is_access(n)}
    for node, name in shown.items():
        made.boxes.append(Box(name, _text(node, names), _SHAPES.get(node.op, "box")))
        arrows = {}
        for source in node.all_input_nodes:
            origin, label = _origin(source)
            arrows[shown[origin], label] = Arrow(shown[origin], name, label)
        made.arrows += arrows.values()
    return made


def _is_access(node: fx.Node) -> bool:
    """Whether a node only reads a field or a part of another."""
    if node.target is getattr:
        return True
    return node.target is operator.getitem and (
        meta.PART in node.meta or isinstance(node.args[1], (int, str))
    )


def _origin(node: fx.Node) -> tuple[fx.Node, str]:
    """The node whose value this is a part of, and the way there: `.cos`, `[0]`."""
    label = ""
    while _is_access(node):
        whole, key = node.args
        step = f".{key}" if node.target is getattr else f"[{key}]"
        label = step + label
        assert isinstance(whole, fx.Node)
        node = whole
    return node, label


def _text(node: fx.Node, names: facts.Names) -> tuple[str, ...]:
    if node.op == "output":
        return ("output",)
    value = facts.value(node)
    kind = f"{facts.shape(value)} {facts.dtype(value)}".strip()
    name = names[node].removeprefix("self.")
    first = name if node.op in ("placeholder", "get_attr") else facts.operation(node)
    if meta.name(node) and node.op not in ("placeholder", "get_attr"):
        first = f"{name} = {first}"
    return tuple(part for part in (first, kind) if part)


def of_plan(plan: Plan) -> Picture:
    """The whole model: its stack in order, and what each class is made of."""
    root = plan.root
    total = numbers.count(parameters(root))
    made = Picture(f"{plan.spec.name}: {total} parameters")
    stack = Picture(f"{plan.spec.name}: {total} parameters")
    ids = _boxes_of(root, stack)
    stack.arrows += [Arrow(a, b) for a, b in pairwise(box.id for box in stack.boxes)]
    made.frames.append(stack)
    for component in reversed(plan.components):
        if component is root:
            continue
        frame = Picture(f"{component.class_name}: {numbers.count(parameters(component))}")
        ids |= {}
        _boxes_of(component, frame)
        frame.arrows += [Arrow(a, b) for a, b in pairwise(box.id for box in frame.boxes)]
        made.frames.append(frame)
    return made


def _boxes_of(component: Component, picture: Picture) -> dict[str, str]:
    return {}
