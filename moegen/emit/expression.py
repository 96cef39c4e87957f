"""Turns graph nodes and their arguments into Python expressions."""

from __future__ import annotations

import inspect
import json
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from moegen.graph import meta
from moegen.graph.functions import function_name
from moegen.ops.op import op_of

ATOM = 100
_CALL, _UNARY = 90, 70

_BINARY: dict[Any, tuple[str, int]] = {
    operator.pow: ("**", 80),
    operator.mul: ("*", 60),
    operator.truediv: ("/", 60),
    operator.floordiv: ("//", 60),
    operator.mod: ("%", 60),
    operator.matmul: ("@", 60),
    operator.add: ("+", 50),
    operator.sub: ("-", 50),
    operator.and_: ("&", 40),
    operator.xor: ("^", 35),
    operator.or_: ("|", 30),
    operator.lt: ("<", 20),
    operator.le: ("<=", 20),
    operator.gt: (">", 20),
    operator.ge: (">=", 20),
    operator.eq: ("==", 20),
    operator.ne: ("!=", 20),
}
# Methods without annotations in torch, printed as the function of that name, which has them.
_UNTYPED_METHODS = {"unflatten"}
_PREFIX: dict[Any, str] = {operator.neg: "-", operator.invert: "~", operator.pos: "+"}

# Builtins whose signatures Python cannot read, as far as elements leave something out.
_TRAILING_NONE = {F.linear}


@dataclass(frozen=True)
class Text:
    """An expression and how tightly it binds."""

    code: str
    binds: int = ATOM

    def within(self, binds: int) -> str:
        """The code, in parentheses if the surroundings bind more tightly."""
        return self.code if self.binds >= binds else f"({self.code})"


@dataclass
class Printer:
    """Prints nodes of one program; `spell` gives the text of a node that is not yet a name."""

    spell: Callable[[fx.Node], Text]
    plain: frozenset[str] = frozenset()  # children whose program is the same as their forward
    ops: set[str] = field(default_factory=set)  # ops that were printed

    def node(self, node: fx.Node) -> Text:
        """The expression that computes a node."""
        if node.op == "get_attr":
            return Text(f"self.{node.target}")
        if node.op == "call_module":
            return Text(self._child(node), _CALL)
        if node.op == "call_method":
            receiver, *rest = node.args
            if node.target in _UNTYPED_METHODS:
                return Text(
                    f"torch.{node.target}({self._arguments(node.args, node.kwargs)})", _CALL
                )
            head = f"{self.value(receiver).within(_CALL)}.{node.target}"
            return Text(f"{head}({self._arguments(rest, node.kwargs)})", _CALL)
        assert node.op == "call_function", node.op
        return self._function(node)

    def _child(self, node: fx.Node) -> str:
        """A call of a child, `self.layers[3].step(x)`."""
        path = re.sub(r"\.(\d+)", r"[\1]", str(node.target))
        method = meta.method(node)
        same = method == "forward" or f"{node.target}.{method}" in self.plain
        return (
            f"self.{path}{'' if same else '.' + method}({self._arguments(node.args, node.kwargs)})"
        )

    def _function(self, node: fx.Node) -> Text:
        target: Any = node.target
        if target in _BINARY:
            return self._binary(*_BINARY[target], *node.args)
        if target in _PREFIX:
            return Text(_PREFIX[target] + self.value(node.args[0]).within(_UNARY), _UNARY)
        if target is operator.getitem:
            whole, index = node.args
            return Text(f"{self.value(whole).within(_CALL)}[{self._index(index)}]", _CALL)
        if target is getattr:
            return Text(f"{self.value(node.args[0]).within(_CALL)}.{node.args[1]}", _CALL)
        if target is tuple and not node.args:
            return Text("()")
        known = op_of(target)
        if known:
            self.ops.add(known.name)
        args, kwargs = without_defaults(target, node.args, node.kwargs)
        return Text(f"{function_name(target)}({self._arguments(args, kwargs)})", _CALL)

    def _binary(self, symbol: str, binds: int, left: Any, right: Any) -> Text:
        first, second = self.value(left).within(binds), self.value(right).within(binds + 1)
        # The formatter's rule: no spaces around a power of names and numbers.
        tight = symbol == "**" and re.fullmatch(r"[\w.]+", first + second)
        return Text(f"{first}{symbol}{second}" if tight else f"{first} {symbol} {second}", binds)

    def _index(self, index: Any) -> str:
        parts = index if isinstance(index, tuple) and index else (index,)
        return ", ".join(
            self._slice(p) if isinstance(p, slice) else self.value(p).code for p in parts
        )

    def _slice(self, part: slice) -> str:
        def bound(value: Any) -> Text:
            return Text("") if value is None else self.value(value)

        bounds = [bound(part.start), bound(part.stop)]
        if part.step is not None:
            bounds.append(bound(part.step))
        # The formatter's rule: spaces around the colon if a bound is more than a name.
        simple = all(b.binds >= _UNARY and "(" not in b.code for b in bounds)
        if simple:
            return ":".join(b.code for b in bounds)
        spaced = " : ".join(b.code for b in bounds)
        return re.sub(r"\s+", " ", spaced).strip()

    def _arguments(self, args: Any, kwargs: Any) -> str:
        texts = [self.value(a).code for a in args]
        return ", ".join([*texts, *(f"{k}={self.value(v).code}" for k, v in kwargs.items())])

    def value(self, value: Any) -> Text:
        """The expression of an argument: a node, a constant, or a structure of them."""
        if isinstance(value, fx.Node):
            return self.spell(value)
        if isinstance(value, dict):
            items = (f"{self.value(k).code}: {self.value(v).code}" for k, v in value.items())
            return Text(f"{{{', '.join(items)}}}")
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            named = dict(zip(value._fields, value, strict=True))
            return Text(f"{type(value).__name__}({self._arguments((), named)})", _CALL)
        if isinstance(value, (tuple, list)):
            return self._sequence(value)
        known = op_of(value)
        if known:
            self.ops.add(known.name)
        return Text(function_name(value)) if callable(value) else constant(value)

    def _sequence(self, value: Any) -> Text:
        texts = [self.value(v).code for v in value]
        together = _comprehension(texts)
        if together and isinstance(value, tuple):
            return Text(f"tuple({together})", _CALL)
        inner = ", ".join(texts)
        if isinstance(value, list):
            return Text(f"[{inner}]")
        return Text(f"({inner},)" if len(texts) == 1 else f"({inner})")


def _comprehension(texts: list[str]) -> str | None:
    """`f(self.layers[0]), f(self.layers[1]), ...` as one generator, if that is what they are."""
    if len(texts) < 2 or "self.layers[0]" not in texts[0]:
        return None
    pattern = texts[0].replace("self.layers[0]", "layer")
    same = all(t.replace(f"self.layers[{i}]", "layer") == pattern for i, t in enumerate(texts))
    return f"{pattern} for layer in self.layers" if same else None


def constant(value: Any) -> Text:
    """A constant as a literal; floats that have no literal are spelled out."""
    if isinstance(value, float) and not math.isfinite(value):
        return Text(f'float("{value}")', _CALL)
    if isinstance(value, bool) or value is None or isinstance(value, torch.dtype):
        return Text(str(value))
    if value is Ellipsis:
        return Text("...")
    if isinstance(value, (int, float)):
        return Text(repr(value), ATOM if value >= 0 else _UNARY)
    if isinstance(value, str):
        return Text(json.dumps(value))
    if isinstance(value, torch.Size):
        return Text(str(tuple(value)))
    raise TypeError(f"no literal for {type(value).__name__}")


def without_defaults(target: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments without those that say what the function does anyway."""
    args = tuple(args)
    while target in _TRAILING_NONE and args and args[-1] is None:
        args = args[:-1]
    known = op_of(target)
    try:
        signature = inspect.signature(known.reference if known else target)
    except (TypeError, ValueError):
        return args, dict(kwargs)
    parameters = list(signature.parameters.values())
    while (
        args and len(args) <= len(parameters) and _is_default(parameters[len(args) - 1], args[-1])
    ):
        args = args[:-1]
    return args, {
        k: v for k, v in kwargs.items() if not _is_default(signature.parameters.get(k), v)
    }


def _is_default(parameter: inspect.Parameter | None, value: Any) -> bool:
    if parameter is None or isinstance(value, (fx.Node, tuple, list, dict)):
        return False
    default = parameter.default
    return type(default) is type(value) and bool(default == value)
