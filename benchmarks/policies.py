"""Trains every routing policy on real text, and writes the table of docs/policies.md.

Run from the repository root as `python -m benchmarks.policies`. One tiny decoder over bytes, one
seed, one dense part: what differs is the policy. Fails if a policy did not learn.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.compile_times import machine
from benchmarks.policy_specs import POLICIES, PRESETS
from benchmarks.policy_training import Options, Outcome, texts, trained

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "policies.md"
RECORD = ROOT / "benchmarks" / "results" / "policies.json"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEADS = (
    "policy",
    "before",
    "after",
    "by step",
    "max/mean",
    "CV²",
    "unused",
    "dropped, train",
    "dropped, eval",
    "speed",
    "active parameters",
)


def row(outcome: Outcome) -> list[str]:
    """One policy's figures as words."""
    name = f"`{outcome.name}`" if outcome.name in PRESETS else outcome.name

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        f"{name} †" if outcome.looks_ahead else name,
        f"{outcome.before:.3f}",
        f"{outcome.after:.3f}",
        f"{outcome.by_step:.3f}",
        number(outcome.load_max_over_mean, ".2f"),
        number(outcome.load_cv2, ".2f"),
        number(outcome.unused, "d"),
        number(outcome.dropped_train, ".1%"),
        number(outcome.dropped_eval, ".1%"),
        f"{outcome.relative_speed:.2f}",
        f"{outcome.active:,}",
    ]


def markdown(outcomes: list[Outcome], options: Options, facts: dict[str, object]) -> str:
    """The table between its markers, with what it was measured on."""
    lines = [
        f"{facts['processor']}, one thread, other work beside it; Python {facts['python']}, "
        f"torch {facts['torch']}, {facts['date']}; {options.steps} steps of {options.batch} x "
        f"{options.sequence} bytes, seed {options.seed}; held-out losses over "
        f"{options.examined * options.sequence:,} bytes of other files.",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|---|{'---:|' * (len(HEADS) - 1)}",
        *(f"| {' | '.join(row(outcome))} |" for outcome in outcomes),
    ]
    return "\n".join(lines)


def write_between(page: Path, text: str) -> None:
    """Put a text between the markers of a page."""
    whole = page.read_text(encoding="utf-8")
    head, mark, rest = whole.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not mark or not end:
        raise click.ClickException(f"{page} has no markers for the table")
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def run(names: tuple[str, ...], options: Options, console: Console) -> list[Outcome]:
    """Train the policies, one after the other."""
    text, outcomes = texts(), []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=options.steps * len(names))
        for name in names:
            progress.update(task, description=name)
            outcome = trained(
                name, POLICIES[name], text, options, tick=lambda: progress.advance(task)
            )
            outcomes.append(outcome)
            progress.console.print(
                f"{name}: {outcome.before:.3f} to {outcome.after:.3f}, "
                f"{outcome.by_step:.3f} by step, {outcome.seconds:.1f} s"
            )
    return outcomes


def shown(outcomes: list[Outcome]) -> Table:
    """The table for a terminal."""
    table = Table(*HEADS)
    for outcome in outcomes:
        table.add_row(*row(outcome))
    return table


def with_earlier(outcomes: list[Outcome], options: Options, record: Path) -> list[Outcome]:
    """These figures and, for all other policies, those of an earlier run with the same options."""
    found = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if found.get("options") != asdict(options):
        return outcomes
    known = {one["name"]: Outcome(**one) for one in found["policies"]}
    known |= {one.name: one for one in outcomes}
    return [known[name] for name in POLICIES if name in known]


@click.command()
@click.option(
    "--steps",
    default=Options.steps,
    type=click.IntRange(1),
    show_default=True,
    help="steps of each training",
)
@click.option("--seed", default=Options.seed, show_default=True, help="of weights and batches")
@click.option("--policy", "chosen", multiple=True, help="only these anew; may be repeated")
@click.option("--page", default=PAGE, type=click.Path(path_type=Path), help="page of the table")
@click.option("--json", "record", default=RECORD, type=click.Path(path_type=Path), help="figures")
@click.option("--write/--no-write", default=True, help="write page and figures, or print alone")
def main(
    steps: int, seed: int, chosen: tuple[str, ...], page: Path, record: Path, write: bool
) -> None:
    """Train every routing policy on real text and write down what came of it."""
    unknown = set(chosen) - set(POLICIES)
    if unknown:
        raise click.ClickException(f"no policy is called {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    options, facts = Options(steps=steps, seed=seed), machine()
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    outcomes = run(chosen or tuple(POLICIES), options, console)
    console.print(shown(outcomes))
    idle = [outcome.name for outcome in outcomes if not outcome.learned]
    if idle:
        raise click.ClickException(f"did not lower the held-out loss: {', '.join(idle)}")
    if write:
        record.parent.mkdir(parents=True, exist_ok=True)
        outcomes = with_earlier(outcomes, options, record)
        found = {
            "options": asdict(options),
            "machine": facts,
            "policies": [asdict(outcome) for outcome in outcomes],
        }
        record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        write_between(page, markdown(outcomes, options, facts))


if __name__ == "__main__":
    main()
