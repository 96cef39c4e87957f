"""A component as text: where it is, its lines of the spec, and its graph as a table."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text
from torch import fx

from moegen.choices import choose
from moegen.emit.words import ranges
from moegen.errors import dotted, visible
from moegen.graph import meta
from moegen.graph.component import Component
from moegen.planner import Plan
from moegen.report import nodes as facts
from moegen.report import numbers
from moegen.report.lookup import copies, layers
from moegen.report.overview import line, parameters
from moegen.report.screen import heading, note, plain, table
from moegen.report.section import section
from moegen.spec.element import Path

WIDE = 110  # columns from which a table has room for whole expressions


def print_component(
    screen: Console, plan: Plan, component: Component, program: str, part: Path | None
) -> None:
    """One component; of its graph only what comes from the section `part`, if given."""
    choose(f"program of {component.class_name}", program, component.programs)
    _head(screen, plan, component)
    _lines(screen, plan, part or component.path)
    graph = component.programs[program].graph
    rows = [node for node in graph.nodes if part is None or _from(node, part)]
    if part is not None:
        here = f"{len(rows)} of {len(graph.nodes)} nodes"
        note(screen, f"{dotted(part)} is traced inside {component.class_name}: {here}.")
    _graph(screen, plan, component, program, rows)


def _head(screen: Console, plan: Plan, component: Component) -> None:
    sites = copies(plan)[id(component)]
    count = numbers.parameters(parameters(component))
    text = Text.assemble((component.class_name, "bold"), f": {count}")
    inside = layers(sites)
    if inside:
        text.append(f", layer{'s' if len(inside) > 1 else ''} {ranges(inside)}")
    if len(sites) > 1:
        text.append(f", {numbers.exact(len(sites))} copies")
    screen.print()
    screen.print(text)
    screen.print(plain(component.element.describe(plan.spec)))
    screen.print(f"programs: {', '.join(component.programs)}")


def _lines(screen: Console, plan: Plan, path: Path) -> None:
    mark = plan.mark(path)
    if mark is None:
        return
    lines = section(mark)
    heading(screen, f"{dotted(path)}  {visible(lines.file)}:{lines.first}")
    for number, text in enumerate(lines.text, lines.first):
        row = Text(f"{number:>5} | ", style="dim").append(visible(text), style="none")
        screen.print(row, no_wrap=True, overflow="ellipsis")
    if lines.more:
        note(screen, f"{'':>5} | ... and {lines.more} more lines")


def _graph(
    screen: Console, plan: Plan, component: Component, program: str, rows: list[fx.Node]
) -> None:
    graph = component.programs[program].graph
    names, costs = facts.name_all(graph), facts.costs(component, program)
    wide = screen.width >= WIDE
    work = plan.workload
    title = f"{component.class_name}.{program}, batch {work.batch} x {work.sequence} tokens"
    whole = costs.total if len(rows) == len(graph.nodes) else facts.NodeFacts()
    footer = ("total", "", "", "", *_cells(whole), "") if whole.flops or whole.saved else ()
    columns = ("name", "op", "shape", "dtype", ">FLOPs", ">saved", ">line")
    made = table(title, columns, footer=footer)
    made.columns[2].no_wrap = True
    for node in rows:
        if node.op == "output" or facts.is_access(node, named=True):
            continue
        cost = costs.nodes.get(node, facts.NodeFacts())
        value = facts.value(node)
        made.add_row(
            names[node].removeprefix("self."),
            facts.expression(component, node, names) if wide else facts.operation(component, node),
            facts.shape(value) if wide else facts.shape(value).replace(", ", ","),
            facts.dtype(value),
            *_cells(cost),
            line(plan, _path(component, node)),
        )
    screen.print()
    screen.print(made)
    for node in rows:
        replaced = dict.fromkeys(w for w in meta.fused(node) if w != "getitem")
        if replaced:
            note(screen, f"{names[node]} is one op in place of {', '.join(replaced)}.")
    note(
        screen,
        "FLOPs: forward, of one call. saved: bytes kept for backward at each node that keeps them; "
        f"the total has a tensor once, and no inputs. line: of the spec. {numbers.BYTES_NOTE}.",
    )


def _cells(cost: facts.NodeFacts) -> tuple[str, str]:
    flops = numbers.flops(cost.flops) if cost.flops else ""
    return flops, numbers.size(cost.saved) if cost.saved else ""


def _path(component: Component, node: fx.Node) -> Path:
    return meta.origin(node).path if meta.ORIGIN in node.meta else component.path


def _from(node: fx.Node, part: Path) -> bool:
    return meta.ORIGIN in node.meta and meta.origin(node).path[: len(part)] == part
