"""Trains any model the same way, and keeps what its losses, measures and experts did."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import moegen
from examples.harness.results import Loads, Run, thinned
from examples.training import CLIP, optimizer, share_of_rate
from moegen.observe import Recorder

POINTS = 200  # of a training curve
ROWS = 80  # of a heatmap

Batch = TypeVar("Batch")
Shares = Callable[[Any], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: warm-up and half a cosine below the peak rate.

    evaluations: on rows held out, spread over the training; the first before any step, the last
    after all. clip: the largest norm of a gradient.
    """

    steps: int
    rate: float = 3e-3
    evaluations: int = 9
    clip: float = CLIP

    def evaluates_after(self, step: int) -> bool:
        """Whether the model is measured after so many steps."""
        parts = max(self.evaluations - 1, 1)
        return step == self.steps or step * parts // self.steps != (step - 1) * parts // self.steps


@dataclass(frozen=True)
class Compiled:
    """A model made from a spec, and what moegen counted: parameters and FLOPs of one row."""

    model: Any
    package: Any
    total: int
    active: int
    flops: float

    def run(self, system: str, seed: int = 0, on: str = "") -> Run:
        """An empty record with these numbers."""
        return Run(system, seed, on, self.total, self.active, self.flops)


def compiled(
    spec: Any, overrides: Any = (), *, seed: int = 0, backend: str = "eager", **workload: Any
) -> Compiled:
    """Plan, estimate and emit a spec, and build its model with initial weights from the seed.

    workload: batch and sequence, for which FLOPs are counted.
    """
    plan = moegen.plan(spec, overrides, backend=backend, **workload)
    estimate = moegen.estimate(plan)
    package = moegen.module(plan, backend=backend)
    torch.manual_seed(seed)
    counts = estimate.counts
    flops = float(estimate.training_flops)
    return Compiled(package.Model(), package, counts.total, counts.active, flops)


def fit(
    run: Run,
    model: Any,
    batches: Iterator[Batch],
    loss: Callable[[Batch], tuple[Tensor, Any]],
    evaluate: Callable[[], Mapping[str, float]],
    schedule: Schedule,
    console: Console,
    *,
    shares: Shares | None = None,
    adam: torch.optim.Optimizer | None = None,
) -> Run:
    """Train a model, and fill its record, which is returned.

    loss: of a batch, the total to descend and the model's output (or None), as `training_loss` of
    emitted models gives them; an output's `routing` and `losses` are recorded. shares: for other
    models, or mixtures without choices, weights of experts [E] for each layer, from the output.
    adam: AdamW with the demo's groups unless given; every group follows the schedule from the rate
    that it has.
    """
    _counted(run, model)
    adam = adam or optimizer(model, schedule.rate)
    peaks = [group["lr"] for group in adam.param_groups]
    kept = _Kept(model, shares)
    run.measure(0, evaluate())
    started = time.perf_counter()
    model.train()
    with bar(console) as progress:
        task = progress.add_task(run.name, total=schedule.steps)
        for step in range(1, schedule.steps + 1):
            for group, peak in zip(adam.param_groups, peaks, strict=True):
                group["lr"] = peak * share_of_rate((step - 1) / schedule.steps)
            total, output = loss(next(batches))
            adam.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            adam.step()
            kept.step(step, total, output)
            if hasattr(model, "update_balance"):
                model.update_balance(output.routing)
            if schedule.evaluates_after(step):
                run.measure(step, evaluate())
                model.train()
            progress.update(task, advance=1, description=described(run))
    run.seconds = time.perf_counter() - started
    kept.fill(run)
    console.print(f"{described(run)}  ({run.seconds:.0f} s)")
    return run


def described(run: Run) -> str:
    """A run and its newest measures in a line."""
    measures = "  ".join(f"{name} {value:.4g}" for name, value in run.final.items())
    return f"{run.name}, seed {run.seed}: {measures}"


def bar(console: Console) -> Progress:
    """A progress bar that leaves nothing behind; advance its tasks by their steps."""
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def shares_over_steps(layer: str, steps: list[int], loads: Tensor) -> Loads:
    """Loads [steps, E] of any unit as shares, of so few steps that a plot can show them."""
    total = loads.double().sum(-1, keepdim=True)
    even = loads.double() / total.where(total > 0, 1)
    places = thinned(len(steps), ROWS)
    return Loads(layer, [steps[p] for p in places], even[places].tolist())


def averaged(losses: list[float]) -> list[tuple[int, float]]:
    """Losses of all steps as few points: (step, mean since the point before)."""
    points, start = [], 0
    for place in thinned(len(losses), POINTS):
        part = losses[start : place + 1]
        points.append((place + 1, sum(part) / len(part)))
        start = place + 1
    return points


class _Kept:
    """Losses and loads of all steps, on the device until the end."""

    def __init__(self, model: Any, shares: Shares | None) -> None:
        self.shares = shares
        names = model.routed_layers() if hasattr(model, "routed_layers") else None
        self.recorder = Recorder(names, most=2 * ROWS)
        self.losses: list[Tensor] = []
        self.given: dict[str, list[Tensor]] = {}
        self.routed = False

    def step(self, number: int, total: Tensor, output: Any) -> None:
        """Keep one step, and let balancing without a loss see it."""
        losses: Mapping[str, Tensor] = getattr(output, "losses", None) or {}
        own = total.detach().clone()
        for value in losses.values():
            own -= value.detach()
        self.losses.append(own)
        if self.shares:
            for name, values in self.shares(output).items():
                self.given.setdefault(name, []).append(values.detach())
            return
        routing = getattr(output, "routing", None)
        if routing:
            self.routed = True
            self.recorder.record(number, routing, losses=losses, loss=total)

    def fill(self, run: Run) -> None:
        """Move it all into a record."""
        run.loss = averaged(torch.stack(self.losses).tolist())
        steps = list(range(1, len(self.losses) + 1))
        for name, values in self.given.items():
            run.loads.append(shares_over_steps(name, steps, torch.stack(values)))
        if self.routed:
            seen = self.recorder.history()
            for layer in seen.layers:
                run.loads.append(shares_over_steps(layer.name, list(seen.steps), layer.load))


def _counted(run: Run, model: nn.Module) -> None:
    """What a model has, unless moegen counted it; all of it is active where nobody said."""
    found = sum(parameter.numel() for parameter in model.parameters())
    run.parameters = found if run.parameters is None else run.parameters
    run.active = run.parameters if run.active is None else run.active
