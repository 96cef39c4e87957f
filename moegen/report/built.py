"""What `moegen build` says it wrote."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from moegen.backend import Backend
from moegen.parameters import count
from moegen.planner import Plan
from moegen.report import numbers
from moegen.report.estimate import headline
from moegen.report.screen import heading, plain, print_warning, table

_LARGE = 10**9  # parameters from which a model is made without memory for them


def print_built(screen: Console, plan: Plan, folder: Path, backend: Backend) -> None:
    """Where the package is, how large its files are, what it may lack here, and the next step."""
    counts = count(plan.root, plan.spec.model.tied)
    screen.print(headline(plan.spec.name, counts, plan.spec.model.active_for))
    heading(screen, Text.assemble("wrote ", plain(folder)))
    rows = table(None, ("file", ">lines", "what"))
    classes = len(plan.components)
    for name, what in (
        ("model.py", f"{classes} classes; import Model from the package"),
        ("ops.py", f"operations, {backend.name} backend: {backend.summary}"),
        ("runtime.py", f"base class {plan.spec.model.runtime}"),
        ("network.py", "base class of that: save, load, statistics"),
        ("spec.yaml", "the spec with all that it extends, and overrides"),
    ):
        text = (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else ""
        rows.add_row(name, numbers.exact(len(text.splitlines())), what)
    screen.print(rows)
    for problem in backend.says(plan):
        screen.print(plain(problem.message), soft_wrap=True)
    for problem in (*plan.warnings, *backend.lacks(plan), *backend.needs(plan)):
        print_warning(screen, problem)
    heading(screen, "next")
    screen.print(f"  {_command(folder, counts.total)}", soft_wrap=True)
    screen.print(Text.assemble("  moegen check ", plain(folder)), soft_wrap=True)


def _command(folder: Path, parameters: int) -> str:
    """A line for the shell that imports the model and prints it."""
    try:
        parts = folder.resolve().relative_to(Path.cwd()).parts
    except ValueError:
        parts = ()
    usable = parts and all(part.isidentifier() for part in parts)
    module = ".".join(parts) if usable else folder.name
    go = "" if usable else f"cd '{folder.resolve().parent}' && "
    lean = "import torch; torch.set_default_device('meta'); " if parameters > _LARGE else ""
    return f'{go}python -c "{lean}from {module} import Model; print(Model())"'
