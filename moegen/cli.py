"""The command `moegen`. Imports what is heavy only inside the commands that need it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from moegen import __version__
from moegen.errors import BackendError, MoegenError
from moegen.exits import TRACEBACK, Commands
from moegen.gpus import GPUS
from moegen.optimizers import OPTIMIZERS


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="SPEC is the path of a YAML file. Exit code 2: the input is wrong; 1: moegen failed.",
)
@click.version_option(__version__, prog_name="moegen")
@click.option(
    "--import",
    "imports",
    metavar="FILE.py",
    multiple=True,
    help="Run a Python file that defines elements, e.g. a routing policy.",
)
@click.option("--traceback", is_flag=True, envvar=TRACEBACK, help="Show where an error was raised.")
def cli(imports: tuple[str, ...], traceback: bool) -> None:
    """Compile a Mixture-of-Experts architecture from a YAML spec to a PyTorch package."""
    if imports:
        from moegen.plugins import load_file

        for path in imports:
            load_file(path)


spec_argument = click.argument("spec", type=click.Path(path_type=str))
backend_option = click.option(
    *("-b", "--backend"), default="eager", show_default=True, help="What emits the ops."
)
override_option = click.option(
    "-o",
    "--override",
    "overrides",
    metavar="PATH=VALUE",
    multiple=True,
    help="Change a value of the spec, e.g. moe.granularity=4; may be given again.",
)


@cli.command()
@spec_argument
@override_option
@backend_option
@click.option("--out", metavar="DIR", help="Folder to write into; generated/NAME unless given.")
@click.option("--force", is_flag=True, help="Write over files that were edited or are foreign.")
@click.option("--strict", is_flag=True, help="Fail where the backend would fall back to PyTorch.")
def build(
    spec: str, overrides: tuple[str, ...], backend: str, out: str | None, force: bool, strict: bool
) -> None:
    """Write SPEC's model as a package of Python files."""
    from moegen.api import build as write
    from moegen.api import plan
    from moegen.backend import backend as find_backend
    from moegen.report.built import print_built
    from moegen.report.screen import console

    chosen = find_backend(backend)
    made = plan(spec, overrides, backend=backend)
    lacking = tuple(chosen.lacks(made))
    if strict and lacking:
        hint = "without --strict it is built all the same"
        raise BackendError(replace(problem, hint=hint) for problem in lacking)
    folder = write(made, out, backend=backend, force=force)
    print_built(console(), made, folder, chosen)


@cli.command()
@spec_argument
@override_option
@backend_option
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--sequence", type=click.IntRange(min=1), help="Tokens; max_sequence, at most 4096.")
@click.option(
    "--optimizer",
    metavar="NAME",
    default="adamw-mixed",
    show_default=True,
    help=f"For the memory of training: {', '.join(OPTIMIZERS)}.",
)
@click.option("--checkpointing", is_flag=True, help="Recompute layers in the backward pass.")
@click.option("--gpu", metavar="NAME", help=f"Say whether one holds it: {', '.join(GPUS)}.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: integers exact, keys stable.")
def estimate(spec: str, overrides: tuple[str, ...], as_json: bool, **workload: Any) -> None:
    """Print SPEC's parameters, FLOPs and memory.

    An override with several values, -o moe.granularity=1,2,4, makes a table with a row for each
    combination.
    """
    from moegen.api import estimate as of_spec
    from moegen.report.sweep import print_sweep, sweep_facts, varied
    from moegen.spec.source import sweep

    combinations = sweep(overrides)
    if len(combinations) > 1:
        names = varied(overrides)
        if as_json:
            _print_json(sweep_facts(spec, combinations, names, workload))
        else:
            print_sweep(spec, combinations, names, workload)
        return
    made = of_spec(spec, combinations[0], **workload)
    if as_json:
        from moegen.report.facts import facts

        _print_json(facts(made))
    else:
        from moegen.report.estimate import print_estimate
        from moegen.report.screen import console

        print_estimate(console(), made)


@cli.command()
@spec_argument
@click.argument("path", required=False)
@override_option
@backend_option
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--sequence", type=click.IntRange(min=1), help="Tokens; max_sequence, at most 4096.")
@click.option(
    "--program",
    metavar="NAME",
    default="forward",
    show_default=True,
    help="Which program: forward, step, new_cache, loss, or another that a class has.",
)
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "mermaid", "dot"]),
    default="text",
    show_default=True,
    help="A table, or a picture for Markdown or Graphviz.",
)
@click.option("--routing", is_flag=True, help="Tell what happens to a token in routed layers.")
@click.option("--json", "as_json", is_flag=True, help="With --routing: print JSON.")
def show(
    spec: str,
    path: str | None,
    overrides: tuple[str, ...],
    backend: str,
    program: str,
    style: str,
    batch: int,
    sequence: int | None,
    routing: bool,
    as_json: bool,
) -> None:
    """Show the classes of SPEC, the graph of one, or its routing in words.

    PATH is a section of the spec, such as moe or model.moe.router, or the name of a class.
    """
    from moegen.api import plan
    from moegen.report.show import show_picture, show_text

    if routing:
        if path is not None or style != "text" or program != "forward":
            raise click.UsageError("--routing takes no PATH, --program or --format")
        _tell_routing(spec, overrides, batch, sequence, as_json)
        return
    if as_json:
        raise click.UsageError("--json is for --routing")
    made = plan(spec, overrides, batch=batch, sequence=sequence, backend=backend)
    if style == "text":
        show_text(made, path, program)
    else:
        show_picture(made, path, program, style)


def _tell_routing(
    spec: str, overrides: tuple[str, ...], batch: int, sequence: int | None, as_json: bool
) -> None:
    from moegen.report.routing import print_routing, routing_facts
    from moegen.report.screen import console

    if as_json:
        _print_json(routing_facts(spec, overrides, batch, sequence))
    else:
        print_routing(console(), spec, overrides, batch, sequence)


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.pass_context
def check(ctx: click.Context, folder: Path) -> None:
    """Compare the package in DIR with what its own spec.yaml gives.

    Exit code 1 and a line for each file that differs.
    """
    from moegen.api import check as differences

    found = differences(folder)
    for line in found:
        click.echo(f"{folder}: {line}")
    if found:
        ctx.exit(1)
    click.echo(f"{folder} is what its spec.yaml gives")


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--tokens",
    type=click.IntRange(min=1, max=2**24),
    multiple=True,
    default=(1, 64, 1024, 8192, 32768),
    show_default=True,
    help="Tokens of a call to measure for; may be given again.",
)
def tune(folder: Path, tokens: tuple[int, ...]) -> None:
    """Measure which tiles suit this GPU best, for the kernels of the package in DIR.

    What is found is written into the package, which then uses it; without it, a model of the chip
    chooses. Nothing is ever measured while a model runs.
    """
    from moegen.api import tune as measure
    from moegen.report.screen import progress_bar

    with progress_bar() as progress:
        said = measure(folder, tokens, progress)
    click.echo(said)


@cli.command()
@click.option("--out", metavar="FILE", help="Write to a file; standard output unless given.")
def schema(out: str | None) -> None:
    """Print the JSON Schema of specs, for completion in an editor."""
    from moegen.report.schema import schema_text

    text = schema_text()
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        Path(out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise MoegenError(f"cannot write {out}: {error.strerror or error}") from None
    click.echo(f"wrote {out}", err=True)


@cli.command()
@click.argument("spec", required=False)
def backends(spec: str | None) -> None:
    """List the installed backends, and what they lack, for SPEC if given."""
    from moegen.report.listing import print_backends
    from moegen.report.screen import console

    print_backends(console(), spec)


@cli.command()
@click.argument("family", required=False)
@click.option("--count", is_flag=True, help="Count parameters; the authors' figures otherwise.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def specs(family: str | None, count: bool, as_json: bool) -> None:
    """List the specs in ./specs, or else those that come with moegen, by family.

    FAMILY lists the specs of one alone.
    """
    from moegen.report.screen import console
    from moegen.report.specs import print_specs, specs_facts

    if as_json:
        _print_json(specs_facts(family, counted=count))
    else:
        print_specs(console(), family, counted=count)


@cli.command()
@click.argument("name")
@click.option("--from", "source", metavar="SPEC", required=True, help="A spec's name or file.")
@click.option("--out", metavar="FILE", help="Write to this file; NAME.yaml unless given.")
def new(name: str, source: str, out: str | None) -> None:
    """Start a spec of your own, called NAME, from another one.

    It is a single file, which says all that the other one extends.
    """
    from moegen.report.specs import find_spec
    from moegen.spec.start import start

    place = start(find_spec(source), name, Path(out or f"{name}.yaml"))
    click.echo(f"wrote {place}; see: moegen estimate {place}")


@cli.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def routing(name: str | None, as_json: bool) -> None:
    """List what a routed layer can be made of, and presets; or tell of NAME in full.

    NAME is a part (score), one of its kinds (cosine, score.cosine), or a preset (switch-base).
    """
    from moegen.plugins import load_installed
    from moegen.report.parts import print_named, print_parts
    from moegen.report.screen import console
    from moegen.report.vocabulary import facts

    load_installed()
    if as_json:
        _print_json(facts(name))
    elif name:
        print_named(console(), name)
    else:
        print_parts(console())


def _print_json(facts: Any) -> None:
    click.echo(json.dumps(facts, indent=2))


def main() -> None:
    """The entry point of the command."""
    cli()
