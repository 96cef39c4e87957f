"""Experts as one op: gather, first product, activation, second product, sum by token."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx

from moegen.graph.component import Component
from moegen.ops.activations import identity
from moegen.ops.experts import combine, gather_rows, grouped_bias, grouped_linear
from moegen.ops.feed_forward import grouped_feed_forward, routed_feed_forward
from moegen.ops.op import op_of
from moegen.passes.fuse import Fusion, replace

_ELEMENTWISE = (F.relu, F.gelu, F.silu)  # of torch's, what activations are made of


def experts_fusion(knows: Callable[[str], bool]) -> Fusion:
    """Networks of experts, with the gather before and the sum after them where these are there.

    What stands between the products must be one elementwise function, whose name `knows`: with
    dropout there, the products stay as they are.
    """

    def fusion(component: Component, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target is grouped_linear:
                found = _network(node)
                if found is not None and knows(found.activation.__name__):
                    _rewrite(component, found)

    return fusion


fuse_experts = experts_fusion(lambda activation: True)


@dataclass(frozen=True)
class _Projection:
    """A grouped product, and its bias if it has one; the last node is what others read."""

    nodes: tuple[fx.Node, ...]
    rows: Any
    weight: Any
    ends: Any
    bias: Any


@dataclass(frozen=True)
class _Network:
    """Two products with an activation between, nodes in the order of the graph."""

    first: _Projection
    second: _Projection
    activation: Callable[..., Any]
    settings: dict[str, Any]
    between: tuple[fx.Node, ...]


def _network(node: fx.Node) -> _Network | None:
    """The network whose second product is a node, if its values are read nowhere else."""
    second = _onward(node)
    activation, settings, between = _activation(second.rows)
    source = between[0].args[0] if between else second.rows
    first = _backward(source)
    if first is None or first.ends is not second.ends:
        return None
    inside = [*first.nodes, *between]
    known = {*inside, *second.nodes}
    if not all(set(n.users) <= known for n in inside):
        return None
    return _Network(first, second, activation, settings, between)


def _onward(node: Any) -> _Projection:
    """A product with the bias that follows it."""
    rows, weight, ends = node.args
    after = list(node.users)
    if len(after) == 1 and after[0].target is grouped_bias and after[0].args[2] is ends:
        return _Projection((node, after[0]), rows, weight, ends, after[0].args[1])
    return _Projection((node,), rows, weight, ends, None)


def _backward(node: Any) -> _Projection | None:
    """The product, with or without a bias, that a node is the result of."""
    target = getattr(node, "target", None)
    if target is grouped_bias:
        product = node.args[0]
        if product.target is not grouped_linear or product.args[2] is not node.args[2]:
            return None
        rows, weight, ends = product.args
        return _Projection((product, node), rows, weight, ends, node.args[1])
    if target is not grouped_linear:
        return None
    rows, weight, ends = node.args
    return _Projection((node,), rows, weight, ends, None)


def _activation(node: Any) -> tuple[Callable[..., Any], dict[str, Any], tuple[fx.Node, ...]]:
    """The function between two products, its settings, and its nodes; the identity if none."""
    known = op_of(getattr(node, "target", None))
    if not (node.target in _ELEMENTWISE or (known and known.elementwise)):
        return identity, {}, ()
    inputs = [a for a in node.args if isinstance(a, fx.Node)]
    settings = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    if len(inputs) == 1:
        return node.target, settings, (node,)
    split = inputs[0].args[0] if inputs[0].target is operator.getitem else None
    halves = isinstance(split, fx.Node) and split.target == "chunk" and split.args[1:] == (2, -1)
    parts = [(i.target, i.args) for i in inputs]
    if not halves or parts != [(operator.getitem, (split, 0)), (operator.getitem, (split, 1))]:
        return identity, {}, ()
    assert isinstance(split, fx.Node)
    return node.target, settings, (split, *inputs, node)


def _rewrite(component: Component, found: _Network) -> None:
    first, second = found.first, found.second
    inside = [*first.nodes, *found.between, *second.nodes]
    tail: list[fx.Node] = [p for p in (first.bias, second.bias) if p is not None]
    biases = (first.bias, second.bias) if tail else ()
    named = {"activation": found.activation, **found.settings}
    if getattr(getattr(component.element, "experts", None), "recompute", False):
        named["recompute"] = True
    parameters = (first.weight, second.weight, *biases)
    before, total = _gathered(first.rows), _summed(second.nodes[-1])
    if not before or total is None or total.args[1] is not before[0].args[1]:
        args: tuple[Any, ...] = (first.rows, first.ends, *parameters)
        _put(inside, grouped_feed_forward, args, named, "rows")
        return
    tokens, order = before[0].args
    args = (tokens, order, total.args[2], first.ends, *parameters)
    _put([*before, *inside, total], routed_feed_forward, args, named, "out")


def _put(
    old: list[fx.Node],
    target: Callable[..., Any],
    args: tuple[Any, ...],
    named: dict[str, Any],
    name: str,
) -> None:
    graph = old[0].graph
    reads = [a for a in args if isinstance(a, fx.Node)]
    replace(old, lambda: graph.call_function(target, args, named), reads, name)


def _gathered(rows: fx.Node) -> list[fx.Node]:
    """The gather of tokens that a product reads, and the cast after it; none if others read it.

    The op casts tokens to the format of its parameters, so a cast before it is not needed.
    """
    cast = [rows] if rows.target == "to" and len(rows.users) == 1 else []
    made: Any = rows.args[0] if cast else rows
    alone = made.target is gather_rows and len(made.users) == 1
    return [made, *cast] if alone else []


def _summed(last: fx.Node) -> fx.Node | None:
    """The sum by token that reads a product's result, if nothing else does."""
    users = list(last.users)
    alone = len(users) == 1 and users[0].target is combine and users[0].args[0] is last
    return users[0] if alone else None
