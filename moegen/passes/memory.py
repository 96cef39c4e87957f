"""Finds the most memory that a program needs at once, from how long each value lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import fx

from moegen.passes.refs import made

Bytes = Callable[[fx.Node], int]


def peak_forward(nodes: Sequence[fx.Node], own: Bytes, inside: Bytes) -> int:
    """The most bytes alive at once walking forwards.

    own: bytes of a value that nothing else accounts for; inside: what a call needs on top while
    it runs. A value lives until its last reader is done.
    """
    place = {node: i for i, node in enumerate(nodes)}
    ends: dict[int, list[fx.Node]] = {}
    for node in nodes:
        end = max((place[user] for user in node.users), default=place[node])
        ends.setdefault(end, []).append(node)
    now = peak = 0
    for node in nodes:
        now += own(node)
        peak = max(peak, now + inside(node))
        now -= sum(own(done) for done in ends.get(place[node], ()))
    return peak


def peak_backward(nodes: Sequence[fx.Node], grads: Mapping[fx.Node, bool], inside: Bytes) -> int:
    """The most bytes of gradients alive at once walking backwards.

    The gradient of a value lives from its last reader's backward step to its maker's; those of
    parameters are counted elsewhere.
    """
    alive: dict[fx.Node, int] = {}
    now = peak = 0
    for node in reversed(nodes):
        if node.op == "output" or not grads.get(node):
            continue
        for value in (node, *node.all_input_nodes):
            if value not in alive and grads.get(value) and value.op != "get_attr":
                alive[value] = made(value)
                now += alive[value]
        peak = max(peak, now + inside(node))
        now -= alive.pop(node, 0)
    return peak
