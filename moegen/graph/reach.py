"""Keeps the programs that a model's own programs lead to: an encoder's blocks never decode."""

from __future__ import annotations

from moegen.graph import meta
from moegen.graph.component import Component


def drop_unreached(root: Component) -> None:
    """Remove the programs of components that no program of the root comes to, in place."""
    reached: dict[int, set[str]] = {}
    waiting = [(root, program) for program in root.programs]
    while waiting:
        component, program = waiting.pop()
        known = reached.setdefault(id(component), set())
        if program in known:
            continue
        known.add(program)
        for node in component.programs[program].graph.nodes:
            if node.op == "call_module":
                waiting.append((component.children[str(node.target)], meta.method(node)))
    for component in root.distinct():
        kept = reached.get(id(component), set())
        component.programs = {n: made for n, made in component.programs.items() if n in kept}
