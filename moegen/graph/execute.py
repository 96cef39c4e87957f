"""Runs a component's program node by node: for fake tensors in passes, for real ones in tests."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from moegen.graph import meta
from moegen.graph.component import Component, attach

Attribute = Callable[[str], Any]
CallChild = Callable[[fx.Node, tuple[Any, ...]], Any]
Done = Callable[[fx.Node, Any], None]
Compute = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def run(
    graph: fx.Graph,
    inputs: tuple[Any, ...],
    attribute: Attribute,
    call: CallChild,
    done: Done,
    compute: Compute = lambda function, arguments, named: function(*arguments, **named),
) -> Any:
    """Run a graph: `attribute` reads parameters, `call` runs children, `done` sees each value.

    compute: calls a function, with its arguments and those that have names.
    """
    values: dict[fx.Node, Any] = {}
    waiting = iter(inputs)

    def read(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: values[node])

    for node in graph.nodes:
        arguments, named = read(node.args), read(node.kwargs)
        if node.op == "placeholder":
            value = next(waiting)
        elif node.op == "get_attr":
            value = attribute(str(node.target))
        elif node.op == "call_module":
            value = call(node, arguments)
        elif node.op == "call_method":
            value = getattr(arguments[0], str(node.target))(*arguments[1:], **named)
        elif node.op == "call_function":
            value = compute(node.target, arguments, named)
        else:
            value = arguments[0]
        values[node] = value
        done(node, value)
    return value


class Executable(nn.Module):
    """A component that runs: every call site has parameters of its own.

    `copy.deepcopy` of the graph modules would keep equal layers sharing one set.
    """

    def __init__(self, component: Component, device: torch.device | str = "cpu") -> None:
        """Make parameters (uninitialised) and buffers (made) for the component and all below."""
        super().__init__()
        self.component = component
        for name, weight in component.weights.items():
            value = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            self.register_parameter(name, nn.Parameter(value, requires_grad=weight.trained))
        for name, made in component.buffers.items():
            value = made.make(**dict(made.arguments)).to(device)
            self.register_buffer(name, value, persistent=made.persistent)
        for name, child in component.children.items():
            attach(self, name, Executable(child, device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter and make every buffer, in the order of emitted models."""
        children = self.component.children
        for name in sorted(children, key=lambda name: "." in name):  # stacks come last
            operator.attrgetter(name)(self).reset_parameters()
        for name, weight in self.component.weights.items():
            weight.init.start(getattr(self, name))
        for name, made in self.component.buffers.items():
            getattr(self, name).copy_(made.make(**dict(made.arguments)))

    def forward(self, *inputs: Any, program: str = "forward") -> Any:
        """Run one of the component's programs."""

        def call(node: fx.Node, arguments: tuple[Any, ...]) -> Any:
            child = operator.attrgetter(str(node.target))(self)
            return child(*arguments, program=meta.method(node))

        graph = self.component.programs[program].graph
        return run(graph, inputs, lambda name: getattr(self, name), call, lambda n, v: None)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of a structure, in order."""
    found: list[Tensor] = []

    def look(part: Any) -> Any:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (tuple, list)):
            for item in part:
                look(item)
        elif isinstance(part, dict):
            for item in part.values():
                look(item)
        return part

    look(value)
    return found
