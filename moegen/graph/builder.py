"""Traces an element's plain torch on proxies: a straight-line component in its author's names."""

from __future__ import annotations

import contextlib
import inspect
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import fx, nn

from moegen.graph import meta
from moegen.graph.component import Buffer, Component, Init, Weight, attach
from moegen.graph.fault import Fault, raised_at
from moegen.graph.layer import Layer
from moegen.graph.names import assigned, author_frame
from moegen.graph.reach import drop_unreached
from moegen.graph.tracer import ComponentTracer
from moegen.ops.gradients import scale_gradient
from moegen.ops.op import op_of
from moegen.spec.element import Element, Path


@dataclass
class Trace:
    """One plan's tracing: the spec, and the components and record types made so far.

    Never shared between plans, because a backend rewrites the graphs.
    """

    spec: Any
    components: dict[tuple[Any, ...], Component] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)

    def root(self) -> Component:
        """The component of the whole model."""
        made = self.component(self.spec.model, ("model",), "other")
        drop_unreached(made)
        return made

    def component(
        self, element: Layer, path: Path, role: str, width: int | None = None, scope: str = ""
    ) -> Component:
        """The component of an element, traced with all its programs; width as in `child`.

        scope: of the component that it is a child of.
        """
        width = getattr(self.spec.model, "d_model", 0) if width is None else width
        key = (type(element), element.model_dump_json(), path, role, width, scope)
        known = self.components.get(key)
        if known is None:
            known = Component(element, self._class_name(element, scope), path, role)
            for program in element.programs():
                Builder(self, known, program, role, width, element.scope or scope).trace_program()
            self.components[key] = known
        return known

    def record(self, name: str, fields: tuple[str, ...]) -> Any:
        """The record type of a name; all records of a name have the same fields."""
        if name not in self.records:
            self.records[name] = namedtuple(name, fields)
        known = self.records[name]
        assert known._fields == fields, f"two records called {name} differ"
        return known

    def _class_name(self, element: Layer, scope: str) -> str:
        taken = {c.class_name for c in self.components.values()}
        wanted = f"{scope}{element.class_name()}"
        names = [wanted, *(f"{wanted}{i}" for i in range(2, len(taken) + 3))]
        return next(n for n in names if n not in taken)


class Builder:
    """What an element's method sees: the spec's facts, and ways to own parameters and children."""

    def __init__(
        self,
        trace: Trace,
        component: Component,
        program: str,
        role: str,
        width: int,
        scope: str,
    ) -> None:
        """Prepare to trace one program of a component."""
        self.trace = trace
        self.spec = trace.spec
        self.component = component
        self.program = program
        self.role = role
        self.width = width  # of the vectors that the component is given
        self.scope = scope  # of the component's children
        self.graph = fx.Graph()
        self.tracer = ComponentTracer(self.graph, component.path)
        self.root = nn.Module()
        self._attributes: dict[str, fx.Proxy] = {}

    # What an element may ask for

    def param(
        self,
        name: str,
        *shape: int,
        dtype: torch.dtype | None = None,
        compute: torch.dtype | None = None,
        init: Init | None = None,
        role: str | None = None,
        active: Fraction = Fraction(1),
    ) -> Any:
        """A parameter of this component, read in the dtype that it computes in.

        dtype: how it is kept; the spec's `precision.parameters` unless given.
        compute: how it is used; the spec's `precision.compute` unless given.
        """
        role = role or self.role
        kept = dtype or self.spec.precision.parameter_dtype
        used = compute or (dtype or self.spec.precision.compute_dtype)
        start = init or self.spec.init.of(shape, role, name)
        weight = Weight(shape, kept, role, start, active, self.spec.train.trains(role))
        assert self.component.weights.setdefault(name, weight) == weight, name
        proxy: Any = self._attribute(name)
        gradient = self.spec.train.rates_of(role).gradient
        proxy = proxy if gradient == 1 else scale_gradient(proxy, gradient)
        return proxy if kept == used else proxy.to(used)

    def buffer(
        self,
        name: str,
        *shape: int,
        make: Callable[..., torch.Tensor],
        dtype: torch.dtype = torch.float32,
        persistent: bool = False,
        **arguments: Any,
    ) -> Any:
        """A tensor of this component that `make(**arguments)` computes."""
        made = Buffer(shape, dtype, make, tuple(arguments.items()), persistent)
        assert self.component.buffers.setdefault(name, made) == made, name
        return self._attribute(name)

    @property
    def training(self) -> Any:
        """Whether the module is in training mode, as a value of the graph."""
        return self._attribute("training")

    def child(
        self,
        name: str,
        element: Layer,
        *inputs: Any,
        path: Path | None = None,
        role: str | None = None,
        program: str | None = None,
        width: int | None = None,
    ) -> Any:
        """Call a child component; its own trace decides what it holds and computes.

        width: of the vectors that it is given, this component's own unless given.
        """
        wide = self.width if width is None else width
        child = self.trace.component(element, self.path(path), role or self.role, wide, self.scope)
        known = self.component.children.setdefault(name, child)
        assert known is child, f"two children called {name}"
        wanted = program or self.program
        method = wanted if wanted in child.programs else "forward"
        attach(self.root, name, child.programs[method])
        out = self.tracer.create_proxy("call_module", name, inputs, {})
        out.node.meta[meta.METHOD] = method
        return out

    def inline(self, element: Element, method: str, *inputs: Any, path: Path | None = None) -> Any:
        """Trace a part's method into this component; its nodes point to its own spec lines."""
        outer, self.tracer.path = self.tracer.path, self.path(path)
        try:
            out = getattr(element, method)(self, *inputs)
        except _WRONG as error:
            raise self._fault(error) from error
        finally:
            self.tracer.path = outer
        self._adopt(out)
        return out

    def record(self, name: str, **fields: Any) -> Any:
        """A named tuple of values; its type is emitted beside the classes."""
        kind = self.trace.record(name, tuple(fields))
        return self.tracer.create_proxy("call_function", kind, (), fields)

    def no_items(self) -> Any:
        """The empty tuple as a value of the graph, for a loop over layers to add to."""
        return self.tracer.create_proxy("call_function", tuple, (), {})

    def name(self, value: Any, name: str) -> Any:
        """Call a value by a name that its author's line does not tell."""
        value.node.meta[meta.NAME] = name
        return value

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Statements traced inside stand under a comment with this name."""
        outer, self.tracer.section = self.tracer.section, name
        try:
            yield
        finally:
            self.tracer.section = outer

    def path(self, below: Path | None) -> Path:
        """A path below this component's own; an absolute one starts with "model"."""
        if below is None:
            return self.tracer.path
        absolute = below[:1] == ("model",)
        return below if absolute else (*self.component.path, *below)

    # How it is traced

    def trace_program(self) -> None:
        """Trace the program and leave it in the component as a GraphModule."""
        method = getattr(self.component.element, self.program)
        inputs = {
            name: self.tracer.create_proxy("placeholder", name, (), {})
            for name in inputs_of(self.component.element, self.program)
        }
        try:
            out = self.tracer.create_arg(method(self, **inputs))
        except _WRONG as error:
            raise self._fault(error) from error
        last = self.graph.output(out)
        last.meta[meta.ORIGIN] = meta.Origin(self.component.path, "")
        drop_dead(self.graph)
        self._own_weights()
        self.component.programs[self.program] = fx.GraphModule(
            self.root, self.graph, self.component.class_name
        )

    def _fault(self, error: Exception) -> Fault:
        sentence = (str(error) or type(error).__name__).splitlines()[0]
        if any(word in sentence for word in ("Proxy", "symbolic")):
            sentence += "; an element may branch on its fields, but not on what it computes"
        return Fault(sentence, self.tracer.path, raised_at(error.__traceback__))

    def _attribute(self, name: str) -> fx.Proxy:
        if name not in self._attributes:
            made = self.tracer.create_proxy("get_attr", name, (), {})
            made.node.meta.pop(meta.NAME, None)
            self._attributes[name] = made
        return self._attributes[name]

    def _own_weights(self) -> None:
        for name in self._attributes:
            if name in self.component.weights:
                w = self.component.weights[name]
                value = torch.empty(w.shape, dtype=w.dtype, device="meta")
                self.root.register_parameter(name, nn.Parameter(value))
            elif name in self.component.buffers:
                buffer = self.component.buffers[name]
                self.root.register_buffer(
                    name, torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
                )

    def _adopt(self, out: Any) -> None:
        """Give a part's nameless result the name that the caller assigns it to."""
        names = assigned(author_frame())
        pairs = [(out, names)] if isinstance(names, str) else []
        if isinstance(names, tuple) and isinstance(out, tuple):
            pairs = list(zip(out, names, strict=False))
        for value, name in pairs:
            if isinstance(value, fx.Proxy) and value.node.op not in ("placeholder", "get_attr"):
                value.node.meta.setdefault(meta.NAME, name)


def inputs_of(element: Layer, program: str) -> list[str]:
    """Names of a program's inputs: its method's, and those given in place of a `**` parameter."""
    names: list[str] = []
    for parameter in list(inspect.signature(getattr(element, program)).parameters.values())[1:]:
        more = parameter.kind is inspect.Parameter.VAR_KEYWORD
        names += element.given() if more else [parameter.name]
    return names


def drop_dead(graph: fx.Graph) -> None:
    """Remove what nothing reads and nothing else would notice."""
    for node in reversed(graph.nodes):
        pure = node.op in ("call_function", "call_method", "get_attr") and not has_effect(node)
        if pure and not node.users:
            graph.erase_node(node)


def has_effect(node: fx.Node) -> bool:
    """Whether a node writes to something or draws random numbers."""
    known = op_of(node.target)
    return known.effect if known else node.target in _RANDOM


# What an element may raise when it takes a value of the graph for a number.
_WRONG = (
    *(fx.proxy.TraceError, TypeError, ValueError, RuntimeError),
    *(LookupError, AttributeError),
)
_RANDOM = {torch.nn.functional.dropout}
