"""The command of an example: options, tables on the screen, files in a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import click
import torch
from rich.console import Console

from examples.harness import files
from examples.harness.report import report
from examples.harness.results import About, Results
from moegen.errors import MoegenError

GALLERY = Path("docs/gallery")
QUICK = Path("generated/quick")

Value = TypeVar("Value")


@dataclass(frozen=True)
class Setting:
    """What was asked on the command line; console is where progress is shown."""

    quick: bool = False
    seed: int = 0
    seeds: int = 1
    console: Console = field(default_factory=lambda: Console(quiet=True))

    def __call__(self, full: Value, quick: Value) -> Value:
        """One of two values: for results, or for a few seconds that show that it works."""
        return quick if self.quick else full

    @property
    def all_seeds(self) -> range:
        """The seeds of runs that are repeated."""
        return range(self.seed, self.seed + self.seeds)

    def draw(self, seed: int | None = None) -> torch.Generator:
        """A generator of random numbers for batches."""
        return torch.Generator().manual_seed(self.seed if seed is None else seed)


Example = Callable[[Setting], Results]


def command(about: About, *, seeds: int = 1) -> Callable[[Example], click.Command]:
    """Make a function the command `python -m examples.NAME`; seeds: how many unless said."""

    def decorate(example: Example) -> click.Command:
        @click.command(about.name, help=f"{about.title}.\n\n{about.paper}.")
        @click.option("--quick", is_flag=True, help="Seconds instead of minutes, and no results.")
        @click.option("--seed", default=0, show_default=True, help="Of weights and batches.")
        @click.option(
            "--seeds",
            type=click.IntRange(1),
            default=seeds,
            show_default=True,
            help="How many runs of each system, where it is trained more than once.",
        )
        @click.option(
            "--out",
            type=click.Path(path_type=Path, file_okay=False),
            help=f"Folder for results.json and plots. [default: {GALLERY / about.name}, "
            f"with --quick {QUICK / about.name}]",
        )
        @click.option("--force", is_flag=True, help="Replace files that no example wrote.")
        def run(quick: bool, seed: int, seeds: int, out: Path | None, force: bool) -> None:
            folder = out or (QUICK if quick else GALLERY) / about.name
            count = 1 if quick else seeds
            setting = Setting(quick, seed, count, Console(highlight=False, markup=False))
            try:
                files.prepare(folder, force)
                _run(about, example, setting, folder)
            except MoegenError as error:
                click.echo(str(error), err=True)
                raise SystemExit(2) from error

        return run

    return decorate


def _run(about: About, example: Example, setting: Setting, folder: Path) -> None:
    setting.console.print(f"{about.title} ({about.paper})")
    torch.manual_seed(setting.seed)
    results = example(setting)
    setting.console.print(report(results))
    asked = {"quick": setting.quick, "seed": setting.seed, "seeds": setting.seeds}
    for place in files.leave(about, asked, results, folder):
        setting.console.print(f"wrote {place}", soft_wrap=True)
