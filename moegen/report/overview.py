"""The table of a plan's components: class, place in the spec, layers, parameters, calls."""

from __future__ import annotations

from pathlib import Path as FilePath

from rich.console import Console
from rich.text import Text

from moegen.emit.words import ranges
from moegen.errors import dotted, visible
from moegen.graph.component import Component
from moegen.planner import Plan
from moegen.report import numbers
from moegen.report.lookup import copies, layers
from moegen.report.screen import note, plain, table
from moegen.spec.element import Path


def parameters(component: Component) -> int:
    """Parameters of one copy of a component, its children included."""
    return sum(count for count, _, _ in component.totals().values())


def line(plan: Plan, path: Path) -> str:
    """The spec's line of a section, with the file where it is not that of the model."""
    mark, main = plan.mark(path), plan.mark(plan.root.path)
    if mark is None:
        return ""
    other = main is not None and mark.file != main.file
    return visible(f"{FilePath(mark.file).name}:{mark.line}" if other else str(mark.line))


def print_overview(screen: Console, plan: Plan) -> None:
    """One line a component, the model first."""
    total = numbers.parameters(parameters(plan.root))
    name, count = plain(plan.spec.name), len(plan.components)
    mark = plan.mark(plan.root.path)
    screen.print(Text.assemble(name, f": {total}, {count} classes", style="bold"))
    columns = ("class", "section", ">line", "layers", ">copies", ">parameters of one")
    rows = table(None, columns)
    sites = copies(plan)
    for component in reversed(plan.components):
        names = sites[id(component)]
        inside = layers(names)
        rows.add_row(
            component.class_name,
            plain(dotted(component.path)),
            line(plan, component.path),
            ranges(inside) if inside else "-",
            numbers.exact(len(names)),
            numbers.exact(parameters(component)),
        )
    screen.print()
    screen.print(rows)
    if mark is not None:
        note(screen, f"Lines of {visible(mark.file)}.")
    note(screen, "A copy is a call site with parameters of its own, its children's included.")
    note(screen, "`moegen show SPEC CLASS` or `SECTION` shows a graph.")
