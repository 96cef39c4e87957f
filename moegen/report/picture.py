"""Draws a plan, or one program of a component, as boxes and arrows."""

from __future__ import annotations

import itertools
from itertools import pairwise

from torch import fx

from moegen.choices import choose
from moegen.draw import Arrow, Box, Picture, Shape
from moegen.emit.words import ranges
from moegen.errors import dotted
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
    shown = {n: f"n{i}" for i, n in enumerate(graph.nodes) if not facts.is_access(n)}
    for node, name in shown.items():
        made.boxes.append(Box(name, _text(component, node, names), _SHAPES.get(node.op, "box")))
        arrows = {}
        for source in node.all_input_nodes:
            origin, label = _origin(source)
            arrows[shown[origin], label] = Arrow(shown[origin], name, label)
        made.arrows += arrows.values()
    return made


def _origin(node: fx.Node) -> tuple[fx.Node, str]:
    """The node whose value this is a part of, and the way there: `.cos`, `[0]`."""
    label = ""
    while facts.is_access(node):
        whole, key = node.args
        step = f".{key}" if node.target is getattr else f"[{key}]"
        label = step + label
        assert isinstance(whole, fx.Node)
        node = whole
    return node, label


def _text(component: Component, node: fx.Node, names: facts.Names) -> tuple[str, ...]:
    if node.op == "output":
        return ("output",)
    value = facts.value(node)
    kind = f"{facts.shape(value)} {facts.dtype(value)}".strip()
    name = names[node].removeprefix("self.")
    first = name if node.op in ("placeholder", "get_attr") else facts.operation(component, node)
    if meta.name(node) and node.op not in ("placeholder", "get_attr"):
        first = f"{name} = {first}"
    return tuple(part for part in (first, kind) if part)


def of_plan(plan: Plan) -> Picture:
    """The whole model: its stack in order, and below it what each class is made of."""
    root = plan.root
    made = Picture(f"{plan.spec.name}: {numbers.parameters(parameters(root))}")
    stack = Picture(made.title)
    made.frames.append(stack)
    first = _Stack(root, stack).first
    below = [c for c in reversed(plan.components) if c is not root and id(c) not in first]
    ids = {**first, **{id(c): f"c{index}" for index, c in enumerate(below)}}
    made.boxes += [Box(ids[id(c)], _class(c), "call") for c in below]
    for component in reversed(plan.components):
        if component is not root:
            names: dict[int, list[str]] = {}
            for name, child in component.children.items():
                names.setdefault(id(child), []).append(name)
            for key, own in names.items():
                arrow = Arrow(ids[id(component)], ids[key], _places(own), dashed=True)
                made.arrows.append(arrow)
    return made


def _places(names: list[str]) -> str:
    """Names of children that are alike: `moe`, or `layers 0-5`."""
    numbers = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
    if len(numbers) < len(names):
        return ", ".join(names)
    return f"layer{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


class _Stack:
    """The model's own parameters and its layers, in the order of their first use."""

    def __init__(self, root: Component, picture: Picture) -> None:
        self.picture = picture
        self.first: dict[int, str] = {}  # by component's id, the first box that stands for it
        self.chain: list[str] = []
        done: set[str] = set()
        for node in root.programs["forward"].graph.nodes:
            target = str(node.target)
            part = target.partition(".")[0]
            if node.op == "placeholder" and not self.chain:
                self._add((target,), "round", picture)
            elif node.op == "get_attr" and target in root.weights and target not in done:
                done.add(target)
                lines = (target, _sizes(root.weights[target].shape))
                self._add(lines, "parameter", picture)
            elif node.op == "call_module" and part not in done:
                done.add(part)
                children = root.children.items()
                self._children([c for n, c in children if n.partition(".")[0] == part])
        self._add(("output",), "round", picture)
        picture.arrows += [Arrow(a, b) for a, b in pairwise(self.chain)]

    def _children(self, layers: list[Component]) -> None:
        """Runs of equal layers as one box each, a repeated pattern in a frame of its own."""
        size = _period(layers)
        times = len(layers) // size
        frame = self.picture
        if 1 < size < len(layers):
            frame = Picture(f"{times} times")
            self.picture.frames.append(frame)
            layers = layers[:size]
        start = 0
        for _, group in itertools.groupby(layers, key=id):
            run = list(group)
            count = f" x {len(run)}" if len(run) > 1 else ""
            name, *rest = _class(run[0])
            word = "layers" if len(run) > 1 else "layer"
            where = f"{word} {ranges(list(range(start, start + len(run))))}"
            place = [where] if frame is self.picture and len(layers) > 1 else []
            box = self._add((f"{name}{count}", *place, *rest), "call", frame)
            self.first.setdefault(id(run[0]), box)
            start += len(run)

    def _add(self, lines: tuple[str, ...], shape: Shape, into: Picture) -> str:
        name = f"s{len(self.chain)}"
        into.boxes.append(Box(name, lines, shape))
        self.chain.append(name)
        return name


def _period(layers: list[Component]) -> int:
    """The length of the shortest pattern whose repetition the stack is; else its own length."""
    for size in range(1, len(layers) // 2 + 1):
        if len(layers) % size == 0 and layers[:size] * (len(layers) // size) == layers:
            return size
    return len(layers)


def _class(component: Component) -> tuple[str, ...]:
    """A class with its section of the spec, if it has one of its own, and its parameters."""
    place = (dotted(component.path),) if len(component.path) > 1 else ()
    count = numbers.count(parameters(component))
    return component.class_name, *place, f"{count} parameters"


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
