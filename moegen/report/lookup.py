"""Finds the components that a path of the spec, or the name of a class, stands for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moegen.errors import MoegenError, Problem, dotted
from moegen.graph.component import Component
from moegen.planner import Plan
from moegen.spec.element import Path
from moegen.spec.words import nearest


@dataclass(frozen=True)
class Found:
    """Components to show. part: the section below them that was asked for, if it has no class."""

    components: tuple[Component, ...]
    part: Path | None = None


def find(plan: Plan, name: str) -> Found:
    """The components of a class name, or of a spec's path such as moe or model.moe.router."""
    components = plan.components
    named = tuple(c for c in components if c.class_name == name)
    if named:
        return Found(named)
    for path in _paths(name):
        exact = tuple(c for c in components if c.path == path)
        if exact:
            return Found((plan.root,) if plan.root in exact else exact)
        inside = tuple(c for c in components if _has_part(c, path))
        if inside:
            return Found(inside, path)
    raise MoegenError(_unknown(plan, name))


def copies(plan: Plan) -> dict[int, list[str]]:
    """By component's id, the dotted names of its call sites; the root's is empty."""
    sites: dict[int, list[str]] = {}
    for name, component in plan.root.walk():
        sites.setdefault(id(component), []).append(name)
    return sites


def layers(names: list[str]) -> list[int]:
    """The layers that call sites are in."""
    found = (re.search(r"(?:^|\.)layers\.(\d+)", name) for name in names)
    return sorted({int(one[1]) for one in found if one})


def _paths(name: str) -> tuple[Path, ...]:
    path: Path = tuple(int(p) if p.isdigit() else p for p in name.strip(".").split("."))
    return path, ("model", *path)


def _has_part(component: Component, path: Path) -> bool:
    """Whether nodes of a component come from a section of the spec."""
    return any(
        node.meta["origin"].path[: len(path)] == path
        for module in component.programs.values()
        for node in module.graph.nodes
        if "origin" in node.meta
    )


def _unknown(plan: Plan, name: str) -> Problem:
    classes = [c.class_name for c in plan.components]
    paths = list(dict.fromkeys(dotted(c.path) for c in plan.components))
    short = [path.removeprefix("model.") for path in paths]
    near = nearest(name, [*classes, *paths, *short])
    return Problem(
        f"nothing in {plan.spec.name} is called {name!r}",
        hint=f"did you mean {near!r}?" if near else None,
        note=f"classes: {', '.join(classes)}\nsections: {', '.join(sorted(short))}",
    )
