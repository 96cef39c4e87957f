"""Rewrites components' graphs: several nodes become one op that does the same with less."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import fx

from moegen.graph import meta
from moegen.graph.component import Component

# A rewrite of one graph of a component, in place. What it cannot fuse it leaves as it is.
Fusion = Callable[[Component, fx.Graph], None]


def fuse(root: Component, fusions: Sequence[Fusion]) -> None:
    """Apply fusions to every program of every component below the root."""
    for component in root.distinct():
        for program in component.programs.values():
            for fusion in fusions:
                fusion(component, program.graph)


def replace(
    old: Sequence[fx.Node], new: Callable[[], fx.Node], reads: Iterable[fx.Node], name: str
) -> None:
    """Put one node in place of several, of which only the last is read by others.

    old: in the order of the graph. The new node stands where the first of them stood, unless what
    it reads is made later; then where the last did. It takes the last one's name, or else the
    given one, and says in its meta which nodes it replaces.
    """
    first, last = old[0], old[-1]
    graph = first.graph
    late = any(node.op != "get_attr" and first < node for node in reads)
    place = last if late else first
    for node in reads:
        if node.op == "get_attr" and place < node:
            place.prepend(node)
    with graph.inserting_before(place):
        made = new()
    made.meta = {k: v for k, v in last.meta.items() if k in (meta.NAME, meta.ORIGIN)}
    made.meta.setdefault(meta.NAME, name)
    if meta.section(first) is not None:
        made.meta[meta.SECTION] = meta.section(first)
    made.meta[meta.FUSED] = tuple(word(node) for node in old)
    last.replace_all_uses_with(made)
    for node in reversed(old):
        if not node.users:
            graph.erase_node(node)


def word(node: fx.Node) -> str:
    """What a node computes, in a word."""
    target = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))
