"""The table of a plan's components: class, place in the spec, layers, parameters, calls."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from moegen.emit.words import ranges
from moegen.errors import dotted
from moegen.graph.component import Component
from moegen.planner import Plan
from moegen.report import numbers
from moegen.report.lookup import copies, layers
from moegen.report.screen import note, plain, table


def parameters(component: Component) -> int:
    """Parameters of one copy of a component, its children included."""
    return sum(count for count, _, _ in component.totals().values())


def place(plan: Plan, component: Component) -> str:
    """File and line of a component's section."""
    mark = plan.mark(component.path)
    return f"{Path(mark.file).name}:{mark.line}" if mark else "-"


def print_overview(screen: Console, plan: Plan) -> None:
    """One line a component, the model first."""
    total = numbers.both(parameters(plan.root))
    count = len(plan.components)
    screen.print(Text.assemble(plain(plan.spec.name), f": {total} parameters, {count} classes"))
    columns = ("class", "section of the spec", "line", "layers", ">copies", ">parameters of one")
    rows = table(None, columns)
    sites = copies(plan)
    for component in reversed(plan.components):
        names = sites[id(component)]
        inside = layers(names)
        rows.add_row(
            component.class_name,
            plain(dotted(component.path)),
            plain(place(plan, component)),
            ranges(inside) if inside else "-",
            numbers.exact(len(names)),
            numbers.exact(parameters(component)),
        )
    screen.print()
    screen.print(rows)
    note(screen, "A copy is one call site with parameters of its own; children are included.")
    note(screen, "Give a section or a class to see its graph, e.g. `moegen show SPEC moe`.")
