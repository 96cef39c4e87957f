"""Plots of runs: losses and measures side by side, and how experts were loaded over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from examples.harness.metrics import spread
from examples.harness.results import Loads, Run, by_name
from examples.plot import canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]


def curves(runs: Sequence[Run]) -> Figure | None:
    """A panel of training losses and one for each measure, a colour a system.

    Of several seeds the mean is drawn, in a band of one standard deviation. None without
    matplotlib, or without anything to draw.
    """
    names = list(dict.fromkeys(name for run in runs for _, v in run.held_out for name in v))
    panels = ["training loss"] * any(run.loss for run in runs) + names
    if not panels:
        return None
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = canvas(4.2 * columns, 3.4 * rows)
    if figure is None:
        return None
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _panel(axes, panel, runs, training=panel == "training loss")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    drawn = [axes for axes in grid[: len(panels)] if axes.lines]
    if drawn:
        drawn[-1].legend(fontsize="x-small")
    return figure


def heatmap(run: Run) -> Figure | None:
    """A panel a routed layer: experts over steps, coloured by their load over an even one."""
    if not run.loads:
        return None
    columns = min(len(run.loads), 3)
    rows = math.ceil(len(run.loads) / columns)
    figure = canvas(4.2 * columns, 3.0 * rows)
    if figure is None:
        return None
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    images = [_heat(axes, loads) for axes, loads in zip(grid, run.loads, strict=False)]
    for axes in grid[len(run.loads) :]:
        axes.set_visible(False)
    figure.colorbar(images[0], ax=list(grid), label="load over the mean load")
    figure.suptitle(run.name, fontsize="medium")
    return figure


def _panel(axes: Any, name: str, runs: Sequence[Run], *, training: bool) -> None:
    for group in by_name(runs).values():
        drawn = [run.loss if training else _series(run, name) for run in group]
        drawn = [points for points in drawn if points]
        if not drawn:
            continue
        steps = [step for step, _ in drawn[0]]
        if any([step for step, _ in points] != steps for points in drawn):
            drawn = drawn[:1]  # other steps cannot be averaged
        found = [spread([points[i][1] for points in drawn]) for i in range(len(steps))]
        mean = [value for value, _ in found]
        label = group[0].system
        if len(mean) == 1:  # measured once, so the same at every step
            color = axes.plot([], [], "--", label=label)[0].get_color()
            axes.axhline(mean[0], linestyle="--", color=color)
            continue
        (line,) = axes.plot(steps, mean, "-" if training else "o-", markersize=3, label=label)
        if len(drawn) > 1:
            low, high = ([m + side * d for m, d in found] for side in (-1, 1))
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step", title=name if training else f"held out: {name}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def _series(run: Run, name: str) -> Points:
    return [(step, v[name]) for step, v in run.held_out if math.isfinite(v.get(name, math.nan))]


def _heat(axes: Any, loads: Loads) -> Any:
    experts = len(loads.shares[0])
    over_mean = [[row[expert] * experts for row in loads.shares] for expert in range(experts)]
    first, last = loads.steps[0], loads.steps[-1]
    extent = (first - 0.5, max(last, first) + 0.5, experts - 0.5, -0.5)
    image = axes.imshow(
        over_mean, aspect="auto", extent=extent, vmin=0, vmax=min(experts, 3.0), cmap="viridis"
    )
    title = f"layer {loads.layer}" if loads.layer.isdigit() else loads.layer
    axes.set(xlabel="step", ylabel="expert", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if experts <= 16:
        axes.set_yticks(range(experts))
    return image
