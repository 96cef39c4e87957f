"""Compiles a small mixture of experts, trains the generated code on Python's sources, samples it.

Run from the repository root: `make demo`, or `python -m examples.train_tiny --help`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Threads that sleep while they wait lose little alone and much less among other processes.
# Read when torch starts, so it is set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import moegen
from examples.corpus import Corpus, standard_library
from examples.plot import save_plot
from examples.training import Step, held_out_loss, optimizer, share_of_rate, train_step
from moegen.api import import_package
from moegen.observe import Recorder

PROMPT = "def "
REPORTS = 8  # lines printed over a training


@dataclass(frozen=True)
class Options:
    """What can be asked of the demo; `minutes` bounds the training, 0 for no bound."""

    spec: str = "specs/tiny.yaml"
    out: Path = Path("generated")
    steps: int = 1500
    minutes: float = 4.0
    batch: int = 16
    sequence: int = 128
    rate: float = 3e-3
    seed: int = 0
    examined: int = 128


@dataclass
class History:
    """What happened, for the plot and the record."""

    routing: Recorder
    steps: list[Step] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    unigram: float = math.nan
    seconds: float = math.nan


def run(options: Options, console: Console) -> History:
    """The whole demo."""
    torch.manual_seed(options.seed)
    package = compiled(options, console)
    model = package.Model()
    corpus = standard_library()
    console.print(
        f"text: {corpus.files} files of Python's standard library; {len(corpus.train):,} bytes "
        f"to train on, {len(corpus.held_out):,} of other files held out\n"
    )
    history = History(Recorder(model.routed_layers(), most=2000))
    exam = corpus.examination(options.examined, options.sequence)
    history.unigram = corpus.unigram_loss(exam)
    train(model, corpus, exam, options, history, console)
    report(history, console)
    show_sample(model, options.sequence - len(PROMPT), console)
    leave(package, model, exam, options, history, console)
    return history


def compiled(options: Options, console: Console) -> Any:
    """Estimate the spec, write its package, and import that."""
    plan = moegen.plan(options.spec, batch=options.batch, sequence=options.sequence)
    estimate = moegen.estimate(plan)
    counts = estimate.counts
    folder = moegen.build(plan, options.out / plan.spec.name)
    lines = len((folder / "model.py").read_text().splitlines())
    console.print(
        f"{options.spec}: {counts.total:,} parameters, {counts.active:,} of them for a token; "
        f"{float(estimate.training_flops) / 1e6:.2f} MFLOPs to train on one"
    )
    console.print(f"wrote {folder / 'model.py'}: {lines} lines that do not import moegen")
    package = import_package(folder)
    counted = package.Model().num_parameters()
    assert counted == counts.total, f"{counted} parameters were built"
    return package


def train(
    model: Any,
    corpus: Corpus,
    exam: torch.Tensor,
    options: Options,
    history: History,
    console: Console,
) -> None:
    """Steps until their number or the time is used up; the schedule ends with either."""
    draw = torch.Generator().manual_seed(options.seed)
    adam = optimizer(model, options.rate)
    limit = 60 * options.minutes or math.inf
    history.held_out.append((0, held_out_loss(model, exam)))
    started, done, next_report = time.perf_counter(), 0.0, 0.0
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        while done < 1:
            ids = corpus.batch(options.batch, options.sequence, draw)
            number, rate = len(history.steps) + 1, options.rate * share_of_rate(done)
            step = train_step(model, adam, ids, rate, history.routing, number)
            history.steps.append(step)
            seconds = time.perf_counter() - started
            done = max(number / options.steps, seconds / limit)
            line = describe(number, step, number * ids.numel() / seconds)
            progress.update(task, completed=done, description=line)
            if done >= next_report:
                if number > 1:
                    history.held_out.append((number, held_out_loss(model, exam)))
                progress.console.print(f"{line}  held-out {history.held_out[-1][1]:.3f}")
                history.routing.show(progress.console)
                next_report = (math.floor(done * REPORTS) + 1) / REPORTS
    history.seconds = time.perf_counter() - started
    if history.held_out[-1][0] != len(history.steps):
        history.held_out.append((len(history.steps), held_out_loss(model, exam)))


def describe(number: int, step: Step, speed: float) -> str:
    """One step in a line."""
    auxiliary = "  ".join(f"{name} {value:.4f}" for name, value in step.auxiliary.items())
    return f"step {number:4d}  loss {step.loss:.3f}  {speed:6,.0f} tokens/s  {auxiliary}"


def report(history: History, console: Console) -> None:
    """Losses before and after, against what the frequencies of bytes give."""
    rows = [
        ("before", history.held_out[0][1]),
        ("frequencies of bytes alone", history.unigram),
        ("after", history.held_out[-1][1]),
    ]
    console.print(f"\n{'held-out loss':<28} nats/byte  bits/byte")
    for name, loss in rows:
        console.print(f"{name:<28} {loss:9.3f}  {loss / math.log(2):9.3f}")
    count = len(history.steps)
    console.print(f"{count} steps, held-out evaluations included, in {history.seconds:.0f} s")


def show_sample(model: Any, new: int, console: Console) -> None:
    """What the model writes after a prompt, each byte that is no text shown as a mark."""
    model.eval()
    ids = torch.tensor([list(PROMPT.encode())])
    written = bytes(model.generate(ids, new, temperature=0.7, top_k=20)[0].tolist())
    text = written.decode(errors="replace")
    shown = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    console.print(f"\nafter {PROMPT!r} it writes:\n")
    console.print(Text(shown))
    model.train()


def leave(
    package: Any,
    model: Any,
    exam: torch.Tensor,
    options: Options,
    history: History,
    console: Console,
) -> None:
    """Save weights, record and plot; read the weights back to see that they are all there."""
    folder = options.out / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "weights.safetensors"
    model.save(weights)
    again = held_out_loss(package.Model.load(weights), exam)
    assert again == history.held_out[-1][1], f"{again} after reading the weights back"
    record = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "steps": [step.loss for step in history.steps],
        "held_out": history.held_out,
        "unigram": history.unigram,
        "seconds": history.seconds,
    }
    (folder / "losses.json").write_text(json.dumps(record, indent=2) + "\n")
    page = history.routing.to_html(folder / "routing.html", "Experts of the demo")
    plot = save_plot(history, folder / "training.png")
    console.print("\nleft behind")
    console.print(f"  {Path(package.__file__).parent}/  the generated package")
    console.print(f"  {weights}  the trained weights, read back and found equal")
    console.print(f"  {folder / 'losses.json'}  every loss")
    console.print(f"  {page}  experts' loads, step by step")
    if plot:
        console.print(f"  {plot}  losses and experts' loads")


def parsed(arguments: Sequence[str] | None) -> Options:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    helps = {
        "spec": "the spec of a decoder over bytes",
        "out": "folder for the package and the results",
        "steps": "at most so many steps",
        "minutes": "at most so long (0: as long as the steps take)",
        "batch": "sequences in a step",
        "sequence": "bytes in a sequence",
        "rate": "peak learning rate",
        "seed": "of weights, batches and the sample",
        "examined": "held-out sequences that losses are measured on",
    }
    for name, default in vars(Options()).items():
        text = f"{helps[name]} (default: {default})"
        parser.add_argument(f"--{name}", type=type(default) if name != "out" else Path, help=text)
    given = {n: v for n, v in vars(parser.parse_args(arguments)).items() if v is not None}
    return Options(**given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; a user's error is a sentence and exit code 2."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        run(parsed(arguments), console)
    except moegen.MoegenError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
