"""Annotates every node with its value as fake tensors; component by component, each once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from moegen.graph import meta
from moegen.graph.component import Component
from moegen.graph.execute import run
from moegen.graph.fault import Fault
from moegen.ops.op import op_of


class Shapes:
    """Runs programs on fake tensors. Equal calls of one component run once."""

    def __init__(self, mode: FakeTensorMode, training: bool = True) -> None:
        """Run under a fake mode, in training or evaluation."""
        self.mode = mode
        self.training = training
        self.results: dict[tuple[Any, ...], Any] = {}
        self.parameters: dict[tuple[int, str], Tensor] = {}

    def run(self, component: Component, program: str, inputs: tuple[Any, ...]) -> Any:
        """Annotate a program and all it calls; its result."""
        key = (id(component), program, signature(inputs))
        if key in self.results:
            return self.results[key]

        def call(node: fx.Node, arguments: tuple[Any, ...]) -> Any:
            child = component.children[str(node.target)]
            return self.run(child, meta.method(node), arguments)

        graph = component.programs[program].graph
        with self.mode, _blame(graph):
            result = run(
                graph,
                inputs,
                lambda name: self._attribute(component, name),
                call,
                self.done,
                _computed,
            )
        self.results[key] = result
        return result

    def done(self, node: fx.Node, value: Any) -> None:
        """Note a node's value."""
        node.meta[meta.VAL] = value

    def _attribute(self, component: Component, name: str) -> Any:
        if name == "training":
            return self.training
        key = (id(component), name)
        if key not in self.parameters:
            facts = component.weights.get(name) or component.buffers[name]
            self.parameters[key] = torch.empty(facts.shape, dtype=facts.dtype)
        return self.parameters[key]


def _computed(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What a function gives; of an op that says so itself, the shape alone."""
    known = op_of(function)
    made = known.result if known and known.result else function
    return made(*arguments, **named)


@contextmanager
def _blame(graph: fx.Graph) -> Iterator[None]:
    """Turn an error of torch into one that names the node and its place in the spec."""
    for node in graph.nodes:
        node.meta.pop(meta.VAL, None)
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        node = next(n for n in graph.nodes if meta.VAL not in n.meta)
        origin = meta.origin(node)
        raise Fault(
            f"{_reason(error)} [{describe(node)}]", origin.path, origin.traced_at
        ) from error


def _reason(error: Exception) -> str:
    """An error of torch in a line."""
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return "what comes out depends on values, and a plan knows shapes alone"
    return (str(error) or type(error).__name__).splitlines()[0]


def describe(node: fx.Node) -> str:
    """A node as its author might write it, with the shapes of what goes in."""

    def shape(argument: fx.Node) -> Any:
        value = argument.meta.get(meta.VAL)
        return list(value.shape) if isinstance(value, Tensor) else value

    target = getattr(node.target, "__name__", str(node.target))
    values = fx.node.map_arg((node.args, node.kwargs), shape)
    arguments = [*map(_word, values[0]), *(f"{k}={_word(v)}" for k, v in values[1].items())]
    name = meta.name(node)
    return f"{name + ' = ' if name else ''}{target}({', '.join(arguments)})"


def _word(value: Any) -> str:
    return str(value.__name__ if callable(value) else value)


def signature(value: Any) -> str:
    """The shapes and dtypes of a structure as text: symbols of sizes cannot be hashed."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(map(str, value.shape))}"
    if isinstance(value, (tuple, list)):
        return f"({','.join(map(signature, value))})"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}:{signature(v)}' for k, v in value.items())}}}"
    return str(value)
