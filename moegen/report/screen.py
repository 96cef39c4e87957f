"""The terminal: consoles, tables and paragraphs in one style, plain text when piped."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from moegen.errors import Problem, visible

Cell = str | Text


def console(*, stderr: bool = False) -> Console:
    """A console; without colour when piped or with NO_COLOR, as wide as COLUMNS or the terminal."""
    return Console(highlight=False, markup=False, emoji=False, stderr=stderr)


def progress_bar() -> Progress:
    """A bar for long work on stderr, which leaves no trace; nothing where that is no terminal."""
    screen = console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)


def plain(text: object) -> Text:
    """Text from a spec, harmless to a terminal."""
    return Text(visible(" ".join(str(text).split())))


def table(title: str | None, columns: Sequence[str], *, footer: Sequence[str] = ()) -> Table:
    """An empty table. A column called ">name" holds numbers; a footer is the row of totals."""
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        footer_style="bold",
        box=box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_footer=bool(footer),
    )
    for index, name in enumerate(columns):
        number = name.startswith(">")
        made.add_column(
            name.removeprefix(">"),
            footer=footer[index] if footer else "",
            justify="right" if number else "left",
            no_wrap=number or index == 0,
            overflow="fold",
        )
    return made


def heading(screen: Console, text: Cell) -> None:
    """A section's title, with an empty line before it."""
    screen.print()
    screen.print(text if isinstance(text, Text) else Text(text), style="bold")


def note(screen: Console, text: Cell) -> None:
    """A remark below a table."""
    screen.print(text if isinstance(text, Text) else Text(text), style="dim")


def print_warning(screen: Console, problem: Problem) -> None:
    """What is allowed but seldom meant, on one line with its place."""
    mark = problem.mark
    place = f"{mark.file}:{mark.line}: " if mark else ""
    hint = f"; {problem.hint}" if problem.hint else ""
    text = f"{place}{problem.message}{hint}"
    screen.print(Text.assemble(("warning: ", "bold"), plain(text)), soft_wrap=True)
