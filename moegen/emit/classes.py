"""Turns components into classes: constructor, initialisation, and a method for each program."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moegen.emit.annotate import annotation, of_output
from moegen.emit.body import Body, Statement
from moegen.emit.expression import constant
from moegen.emit.layout import lay_out
from moegen.emit.loops import roll
from moegen.graph import meta
from moegen.graph.component import Buffer, Component, Init, Weight
from moegen.graph.functions import function_name
from moegen.ops.op import OPS

Docs = Callable[[Component], str]


@dataclass
class Classes:
    """Prints the distinct components of a plan, children first.

    docs gives a class its docstring; bases names what the last class, the model, derives from;
    default is the dtype that need not be said; said describes records and their fields; parts is
    what the model says of its parameters.
    """

    docs: Docs
    base: str
    default: torch.dtype
    records: dict[str, type[tuple[Any, ...]]]
    said: Mapping[str, tuple[str, Mapping[str, str]]]
    parts: list[str]
    ops: set[str] = field(default_factory=set)
    plain: dict[int, set[str]] = field(default_factory=dict)

    def text(self, components: list[Component]) -> str:
        """All classes, the record types they exchange before the first one that uses them."""
        parts = [self._class(c, last=c is components[-1]) for c in components]
        shown = self._records(components)
        return "\n\n\n".join([*shown, *parts])

    # Records

    def _records(self, components: list[Component]) -> list[str]:
        examples: dict[str, Any] = {}
        for component in components:
            for program in component.programs.values():
                for node in program.graph.nodes:
                    _collect(node, examples)
        return [self._record(n, examples[n]) for n in self.records if n in examples]

    def _record(self, name: str, value: Any) -> str:
        fields = zip(value._fields, value, strict=True)
        lines = [f"class {name}(NamedTuple):", f'    """{self.said[name][0]}"""']
        lines += [""] if value._fields else []
        for label, part in fields:
            said = self.said[name][1].get(label)
            lines.append(f"    {label}: {annotation(part)}{f'  # {said}' if said else ''}")
        return "\n".join(lines)

    # Classes

    def _class(self, component: Component, last: bool) -> str:
        base = self.base if last else "nn.Module"
        lines = [f"class {component.class_name}({base}):", *_docstring(self.docs(component), 4), ""]
        if last and self.parts:
            lines += [*self.parts, ""]
        if component.buffers:
            lines += [*(f"    {name}: Tensor" for name in component.buffers), ""]
        lines += self._constructor(component)
        lines += self._reset(component)
        printed: dict[str, list[str]] = {}
        same: set[str] = set()
        for name in component.programs:
            method = self._method(component, name)
            if name != "forward" and method[1:] == printed.get("forward", [None])[1:]:
                same.add(name)
                continue
            printed[name] = method
        self.plain[id(component)] = same
        for name, method in printed.items():
            lines += ["", *_with_doc(method, _summary(component, name, last))]
        return "\n".join(lines)

    def _constructor(self, component: Component) -> list[str]:
        lines = ["    def __init__(self) -> None:", "        super().__init__()"]
        for name, weight in component.weights.items():
            frozen = "" if weight.trained else ", requires_grad=False"
            made = f"torch.empty({self._sizes(weight)}){frozen}"
            lines += lay_out(f"self.{name} = nn.Parameter({made})", 8)
        for name, buffer in component.buffers.items():
            lines += lay_out(self._register(name, buffer), 8)
        for name, kinds in _stacks(component).items():
            # Type checkers know nothing of what a ModuleList holds.
            typed = ": Any" if kinds.startswith("nn.ModuleList") else ""
            lines += lay_out(f"self.{name}{typed} = {kinds}", 8)
        if component.weights or component.buffers:
            lines.append("        self.reset_parameters()")
        return lines

    def _sizes(self, weight: Weight) -> str:
        sizes = ", ".join(map(str, weight.shape)) or "()"
        same = weight.dtype == self.default == torch.float32
        return sizes if same else f"{sizes}, dtype={weight.dtype}"

    def _register(self, name: str, buffer: Buffer) -> str:
        sizes = ", ".join(map(str, buffer.shape)) or "()"
        persistent = "" if buffer.persistent else ", persistent=False"
        made = f"torch.empty({sizes}, dtype={buffer.dtype})"
        return f'self.register_buffer("{name}", {made}{persistent})'

    def _reset(self, component: Component) -> list[str]:
        if not component.weights and not component.buffers:
            return []
        lines = ["", "    @torch.no_grad()", "    def reset_parameters(self) -> None:"]
        lines.append('        """Draw the parameters of this module anew, and make its buffers."""')
        for name, weight in component.weights.items():
            for statement in self._start(f"self.{name}", weight.init):
                lines += lay_out(statement, 8)
        for name, buffer in component.buffers.items():
            lines += lay_out(self._remake(name, buffer), 8)
        return lines

    def _start(self, target: str, init: Init) -> list[str]:
        """What fills a parameter: all of it, or the first of a stack and then its copies."""
        function = init.function if init.function in OPS else f"nn.init.{init.function}"
        self.ops |= {init.function} & OPS.keys()
        arguments = "".join(f", {name}={constant(value).code}" for name, value in init.arguments)
        if not init.identical:
            return [f"{function}({target}{arguments})"]
        return [f"{function}({target}[0]{arguments})", f"{target}[1:] = {target}[0]"]

    def _remake(self, name: str, buffer: Buffer) -> str:
        if buffer.make is torch.zeros:
            return f"self.{name}.zero_()"
        self.ops.add(function_name(buffer.make))
        # What follows from other arguments' defaults is not said.
        known = inspect.signature(buffer.make).parameters
        given = [(k, v) for k, v in buffer.arguments if known[k].default != v]
        arguments = ", ".join(f"{k}={_literal(v)}" for k, v in given)
        return f"self.{name}.copy_({function_name(buffer.make)}({arguments}))"

    # Methods

    def _method(self, component: Component, program: str) -> list[str]:
        graph = component.programs[program].graph
        plain = {
            f"{name}.{method}"
            for name, child in component.children.items()
            for method in self.plain.get(id(child), set())
        }
        body = Body(graph, frozenset(plain))
        statements = body.statements()
        self.ops |= body.ops
        depth = sum(name.startswith("layers.") for name in component.children)
        lines = [*_signature(component, program)]
        section = None
        for indent, statement in roll(statements, depth):
            if statement.section != section and indent == 0:
                section = statement.section
                if section and not statement.code.startswith("return"):
                    lines += ["", f"        # {section}"]
            lines += lay_out(_typed(statement, graph), 8 + 4 * indent)
        return lines


def _typed(statement: Statement, graph: fx.Graph) -> str:
    """An empty tuple needs to be told what it will hold."""
    name, _, value = statement.code.partition(" = ")
    if value != "()":
        return statement.code
    grown = [n for n in graph.nodes if meta.name(n) == name]
    return f"{name}: {annotation(meta.val(grown[-1]))} = ()"


def _signature(component: Component, program: str) -> list[str]:
    graph = component.programs[program].graph
    known = inspect.signature(getattr(component.element, program)).parameters
    parts = ["self"]
    for node in graph.nodes:
        if node.op == "placeholder":
            name = str(node.target)
            optional = name in known and known[name].default is None
            kind = INPUTS.get((type(component.element).__name__, program, name))
            text = kind or annotation(meta.val(node))
            if not optional and any(" = " in part for part in parts) and "*" not in parts:
                parts.append("*")
            parts.append(f"{name}: Tensor | None = None" if optional else f"{name}: {text}")
    return lay_out(f"def {program}({', '.join(parts)}) -> {of_output(graph)}:", 4)


# Inputs whose value in the plan does not tell their type: an example may be empty.
INPUTS: dict[tuple[str, str, str], str] = {}


def _summary(component: Component, program: str, last: bool) -> str | None:
    """A method's docstring: that of the element's own method, where it says more than its name."""
    if not last and program == "forward":
        return None
    text = inspect.getdoc(getattr(component.element, program)) or ""
    return text.splitlines()[0] if text else None


def _with_doc(method: list[str], doc: str | None) -> list[str]:
    if doc is None:
        return method
    end = next(i for i, line in enumerate(method) if line.rstrip().endswith(":"))
    return [*method[: end + 1], f'        """{doc}"""', *method[end + 1 :]]


def _docstring(text: str, indent: int) -> list[str]:
    pad = " " * indent
    lines = text.splitlines()
    if len(lines) == 1:
        return [f'{pad}"""{lines[0]}"""']
    return [f'{pad}"""{lines[0]}', *(f"{pad}{line}".rstrip() for line in lines[1:]), f'{pad}"""']


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        inner = ", ".join(map(_literal, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return constant(value).code


def _stacks(component: Component) -> dict[str, str]:
    """Children by attribute: one instance, or a ModuleList where names are numbered."""
    out: dict[str, str] = {}
    stacks: dict[str, list[str]] = {}
    for name, child in component.children.items():
        head, _, number = name.partition(".")
        if number:
            stacks.setdefault(head, []).append(child.class_name)
        else:
            out[name] = f"{child.class_name}()"
    for head, kinds in stacks.items():
        out[head] = f"nn.ModuleList({_list_of(kinds)})"
    return out


def _list_of(kinds: list[str]) -> str:
    """The instances of a stack: a repeated pattern if there is one, else runs."""
    if len(set(kinds)) == 1:
        return f"{kinds[0]}() for _ in range({len(kinds)})"
    for size in range(2, len(kinds) // 2 + 1):
        if len(kinds) % size == 0 and kinds[:size] * (len(kinds) // size) == kinds:
            return f"kind() for kind in [{', '.join(kinds[:size])}] * {len(kinds) // size}"
    parts: list[str] = []
    for single, runs in itertools.groupby(_runs(kinds), key=lambda run: run[1] == 1):
        if single:
            parts.append(f"[{', '.join(kind for kind, _ in runs)}]")
        else:
            parts += [f"[{kind}] * {count}" for kind, count in runs]
    text = f"kind() for kind in {' + '.join(parts)}"
    return text if len(text) < 70 else f"[{', '.join(f'{kind}()' for kind in kinds)}]"


def _runs(kinds: list[str]) -> list[tuple[str, int]]:
    return [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]


def _collect(node: fx.Node, examples: dict[str, Any]) -> None:
    """Note an example of every record type that a node holds; the fullest one wins."""

    def look(value: Any) -> None:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            examples.setdefault(type(value).__name__, value)
        if isinstance(value, (tuple, list)):
            for part in value:
                look(part)

    if node.target is operator.add:
        return  # a tuple of records grows by others that were seen
    if node.op == "output":
        look(fx.node.map_arg(node.args[0], meta.val))
    elif meta.VAL in node.meta:
        look(meta.val(node))


RECORDS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "Context": (
        "What every layer needs beside the residual stream.",
        {"cos": "[S, r / 2]", "sin": "[S, r / 2]", "valid": "[B * S], False at padding"},
    ),
    "Place": (
        "Where in the sequence a decoding step stands.",
        {"start": "[]", "positions": "[T]", "cos": "[T, r / 2]", "sin": "[T, r / 2]"},
    ),
    "Routing": (
        "What a routed layer did with the tokens of a batch.",
        {
            "load": "[E], choices of real tokens for each expert, before capacity",
            "dropped": "[], the fraction of them beyond capacity",
            "probability": "[E], mean score of each expert",
            "losses": "this layer's own, not weighted",
            "shares": "[G, E], choices of each expert by a real token of each group",
            "probabilities": "[G, E], mean score of each expert in each group",
        },
    ),
    "Output": (
        "What the model returns for training.",
        {
            "logits": "[B, S, V]",
            "losses": "auxiliary, weighted: add them to the loss",
            "routing": "one record for each routed layer",
        },
    ),
}
