"""Tells which values of a graph are one tensor: fields, items and views lead to their source."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx

from moegen.graph import meta


class Ref(NamedTuple):
    """A tensor: the node that makes it, and the way to it inside that node's value."""

    node: fx.Node
    path: tuple[str | int, ...] = ()


Through = Callable[[fx.Node, tuple[str | int, ...]], "Ref | None"]


def resolve(ref: Ref, through: Through) -> Ref | None:
    """The source of a tensor; None if another component accounts for it.

    `through` looks through a call of a child: it gives what the child hands back unchanged,
    the call itself if the child made it, or None.
    """
    node, path = ref
    while True:
        if node.op == "call_module":
            found = through(node, path)
            if found is None or found == (node, path):
                return found
            node, path = found
            continue
        step = _inward(node, path)
        if step is None:
            return Ref(node, path)
        node, path = step


def _inward(node: fx.Node, path: tuple[str | int, ...]) -> Ref | None:
    """One step towards the source, or None if this is it."""
    if node.target is getattr and isinstance(node.args[0], fx.Node):
        return Ref(node.args[0], (str(node.args[1]), *path))
    if node.target is operator.getitem and isinstance(node.args[1], int):
        source: Any = node.args[0]
        if not isinstance(source.meta.get(meta.VAL), Tensor):
            return Ref(source, (node.args[1], *path))
    if path and hasattr(node.target, "_fields"):
        chosen = node.kwargs[str(path[0])]
        return Ref(chosen, path[1:]) if isinstance(chosen, fx.Node) else None
    return _viewed(node, path) if node.op in ("call_function", "call_method") else None


def _viewed(node: fx.Node, path: tuple[str | int, ...]) -> Ref | None:
    """The tensor whose memory a node's value shares: of a view, or of a part of a split."""
    value = node.meta.get(meta.VAL)
    if len(path) == 1 and isinstance(value, (tuple, list)):
        value = at(value, path)
    elif path:
        return None
    if not isinstance(value, Tensor):
        return None
    storage = value.untyped_storage()._cdata
    for source in node.all_input_nodes:
        other = source.meta.get(meta.VAL)
        if isinstance(other, Tensor) and other.untyped_storage()._cdata == storage:
            return Ref(source)
    return None


def handed(node: fx.Node) -> Iterator[Ref]:
    """What a child is given at a node: a tensor, or the fields of a record."""
    value = meta.val(node)
    if isinstance(value, Tensor):
        yield Ref(node)
    for name in getattr(value, "_fields", ()):
        if isinstance(getattr(value, name), Tensor):
            yield Ref(node, (name,))


def at(value: Any, path: tuple[str | int, ...]) -> Any:
    """What stands at a path inside a value."""
    for step in path:
        value = (
            getattr(value, step)
            if isinstance(step, str) and not isinstance(value, dict)
            else value[step]
        )
    return value


def made(node: fx.Node) -> int:
    """Bytes that a node's value is: a tensor, or the tensors of an op's several results.

    Records, and tuples of them, hold what other nodes made.
    """
    value = node.meta.get(meta.VAL)
    if isinstance(value, Tensor):
        return size(value)
    if not isinstance(value, (tuple, list)) or hasattr(value, "_fields"):
        return 0
    grown = node.target in (operator.add, tuple)
    return 0 if grown else sum(size(part) for part in value if isinstance(part, Tensor))


def size(value: Any) -> int:
    """Bytes of a tensor, or of all tensors of a structure."""
    if isinstance(value, Tensor):
        return int(value.numel() * value.dtype.itemsize)
    if isinstance(value, dict):
        return sum(size(v) for v in value.values())
    if isinstance(value, (tuple, list)):
        return sum(size(v) for v in value)
    return 0
