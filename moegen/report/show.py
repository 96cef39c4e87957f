"""What `moegen show` prints of a plan: a table of its classes, one of them, or pictures."""

from __future__ import annotations

import click

from moegen.draw import FORMATS
from moegen.planner import Plan
from moegen.report.graph import print_component
from moegen.report.lookup import find
from moegen.report.overview import print_overview
from moegen.report.picture import of_component, of_plan
from moegen.report.screen import console


def show_text(made: Plan, path: str | None, program: str) -> None:
    """The classes of a plan, or the graph of what a path of the spec stands for."""
    screen = console()
    if path is None:
        print_overview(screen, made)
        return
    found = find(made, path)
    for component in found.components:
        print_component(screen, made, component, program, found.part)


def show_picture(made: Plan, path: str | None, program: str, style: str) -> None:
    """The same as a picture in a format such as mermaid."""
    if path is None:
        pictures = [of_plan(made)]
    else:
        pictures = [of_component(one, program) for one in find(made, path).components]
    for picture in pictures:
        click.echo(FORMATS[style](picture), nl=False)
