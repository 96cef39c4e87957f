"""Turns a program's graph into statements: named values one a line, the others inlined."""

from __future__ import annotations

import builtins
import keyword
import operator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from moegen.emit.expression import ATOM, Printer, Text
from moegen.emit.layout import fits
from moegen.graph import meta
from moegen.graph.builder import has_effect
from moegen.ops.op import OPS

INDENT = 8
# Besides the ops, names that methods refer to.
_TAKEN = {"F", "nn", "self", "torch", *dir(builtins), *keyword.kwlist}


@dataclass(frozen=True)
class Statement:
    """One line of a method before it is laid out, and the comment above it, if any."""

    code: str
    section: str | None = None


@dataclass
class Body:
    """Prints one program. A name is used again once its old value is not needed any more."""

    graph: fx.Graph
    plain: frozenset[str] = frozenset()
    forced: set[fx.Node] = field(default_factory=set)
    ops: set[str] = field(default_factory=set)

    def statements(self) -> list[Statement]:
        """The method's body; values that do not fit on a line get statements of their own."""
        while True:
            attempt = _Attempt(self)
            statements = attempt.run()
            long = next((n for n, s in attempt.roots if not fits(s, INDENT)), None)
            more = attempt.largest_inside(long) if long is not None else None
            if more is None:
                self.ops |= attempt.printer.ops
                return statements
            self.forced.add(more)


class _Attempt:
    """One try at printing, with the decisions made so far about what is a statement."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.nodes = list(body.graph.nodes)
        self.names: dict[fx.Node, str] = {}
        self.holder: dict[str, fx.Node] = {}
        self.roots: list[tuple[fx.Node, str]] = []
        self.inlined: dict[fx.Node, list[fx.Node]] = {}
        self.printer = Printer(self.spell, body.plain)
        self.root = {node: self._is_statement(node) for node in self.nodes}
        self.last = self._last_uses()

    # What becomes a statement

    def _is_statement(self, node: fx.Node) -> bool:
        if node.op in ("placeholder", "get_attr") or self._is_result(node):
            return False
        if node.op == "output" or node in self.body.forced:
            return True
        if meta.PART in node.meta:
            return False  # printed with the value that is unpacked
        if node.target is getattr:
            return False
        if self._parts(node):
            return True
        if meta.name(node) or has_effect(node) or not node.users:
            return True
        return len(node.users) > 1 and not _is_cheap(node)

    def _is_result(self, node: fx.Node) -> bool:
        """Whether a value is only returned, right after it is computed."""
        *_, before, last = self.nodes
        if any(map(is_module_call, [node, *node.all_input_nodes])):
            return False
        return before is node and last.args[0] is node and node not in self.body.forced

    def _parts(self, node: fx.Node) -> list[fx.Node]:
        return [u for u in node.users if meta.PART in u.meta and u.args[0] is node]

    def _last_uses(self) -> dict[fx.Node, int]:
        """For each node, the last place whose statement reads it, through inlined ones too."""
        place = {node: i for i, node in enumerate(self.nodes)}
        last: dict[fx.Node, int] = {}
        for node in reversed(self.nodes):
            uses = [place[u] if self.root[u] else last.get(u, place[u]) for u in node.users]
            last[node] = max(uses, default=place[node])
        return last

    # Printing

    def run(self) -> list[Statement]:
        out: list[Statement] = []
        for place, node in enumerate(self.nodes):
            if node.op == "placeholder":
                self.names[node] = str(node.target)
                self.holder[str(node.target)] = node
                unpack = self._unpack(node, place)
                if unpack:
                    out.append(Statement(unpack))
            elif self.root[node] and not (node.op == "output" and node.args[0] is None):
                code = self._statement(node, place)
                self.roots.append((node, code))
                out.append(Statement(code, meta.section(node)))
        return out

    def _statement(self, node: fx.Node, place: int) -> str:
        self.reading = node
        if node.op == "output":
            return self._return(node)
        value = self.printer.node(node).code
        if not node.users:
            return value
        parts = self._unpack(node, place, value)
        if parts:
            return parts
        first = (meta.name(node) or _plain_name(node)) not in self.holder
        name = self._take(node, place)
        # A module's call has no type of its own.
        typed = first and is_module_call(node) and isinstance(meta.val(node), Tensor)
        return f"{name}{': Tensor' if typed else ''} = {value}"

    def _return(self, node: fx.Node) -> str:
        result = node.args[0]
        text = self.printer.value(result).code
        if isinstance(result, tuple) and not hasattr(result, "_fields") and len(result) > 1:
            text = text[1:-1] if text.startswith("(") else text
        return f"return {text}"

    def _unpack(self, node: fx.Node, place: int, value: str | None = None) -> str | None:
        """`a, b = value` for a node whose parts its author unpacked."""
        parts = {int(p.args[1]): p for p in self._parts(node)}  # type: ignore[arg-type]
        if not parts:
            return None
        if value is None:
            value = self.names[node]
        whole = meta.val(node)
        count = len(whole) if isinstance(whole, (tuple, list)) else max(parts) + 1
        names = []
        for index in range(count):
            part = parts.get(index)
            names.append(self._take(part, place) if part and part.users else "_")
        comma = "," if len(names) == 1 else ""
        target = f"({names[0]},)" if comma else ", ".join(names)
        return f"{target} = {value}"

    def _take(self, node: fx.Node, place: int) -> str:
        """A name for a node's value: its author's, unless that still holds something needed."""
        wanted = meta.name(node) or _plain_name(node)
        name, count = wanted, 2
        while self._is_busy(name, place):
            name, count = f"{wanted}_{count}", count + 1
        self.names[node] = name
        self.holder[name] = node
        return name

    def _is_busy(self, name: str, place: int) -> bool:
        """Whether a name holds something that is read later, or means something else."""
        held = self.holder.get(name)
        alive = held is not None and self.last[held] > place
        return alive or name in _TAKEN or name in OPS

    def spell(self, node: fx.Node) -> Text:
        if node in self.names:
            return Text(self.names[node], ATOM)
        if node.op not in ("placeholder", "get_attr"):
            self.inlined.setdefault(self.reading, []).append(node)
        return self.printer.node(node)

    def largest_inside(self, node: fx.Node) -> fx.Node | None:
        """The longest expression printed inside a statement, to be made one of its own."""
        inside = [
            n
            for n in self.inlined.get(node, [])
            if not _is_cheap(n) and not hasattr(n.target, "_fields")
        ]
        return max(inside, key=lambda n: len(self.printer.node(n).code), default=None)


def is_module_call(node: fx.Node) -> bool:
    """Whether a node is `self.child(...)`, which type checkers know nothing of."""
    return node.op == "call_module" and meta.method(node) == "forward"


def _is_cheap(node: fx.Node) -> bool:
    """Reading a field, a shape or an item: written out wherever it is used."""
    if node.op in ("get_attr", "placeholder") or node.target is getattr:
        return True
    if node.target is operator.getitem and isinstance(node.args[1], int):
        whole: Any = node.args[0]
        return whole.op == "placeholder" or whole.target is getattr
    return False


def _plain_name(node: fx.Node) -> str:
    """A name for a value that its author gave none."""
    target = node.target
    text = target.rpartition(".")[2] if isinstance(target, str) else target.__name__
    name = text.strip("_")
    return name if name.isidentifier() else "value"  # and not the number of a layer
