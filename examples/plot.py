"""Plots a training: losses over steps, and how evenly the experts were loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from examples.train_tiny import History

SMOOTH = 20  # steps that a point of the training curve averages
DPI = 120


def canvas(width: float, height: float) -> Figure | None:
    """An empty figure of so many inches that needs no display; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_plot(history: History, place: Path) -> Path | None:
    """Draw the history into a PNG; nothing without matplotlib."""
    figure = canvas(11, 4)
    if figure is None:
        return None
    losses, loads = figure.subplots(1, 2)
    numbers = range(1, len(history.steps) + 1)
    losses.plot(numbers, smoothed([s.loss for s in history.steps]), label="training")
    losses.plot(*zip(*history.held_out, strict=True), "o-", label="held out")
    losses.axhline(history.unigram, color="gray", linestyle="--", label="frequencies of bytes")
    losses.set(xlabel="step", ylabel="nats/byte", ylim=(0, None))
    losses.legend()
    routing = history.routing.history()
    for layer in routing.layers:
        ratios = [ratio or 0.0 for ratio in layer.statistics["max_over_mean"]]
        loads.plot(routing.steps, smoothed(ratios), label=f"layer {layer.name}")
    loads.set(xlabel="step", ylabel="busiest expert's load over the mean", ylim=(1, None))
    loads.legend()
    figure.savefig(place, dpi=DPI)
    return place


def smoothed(values: list[float]) -> list[float]:
    """Each value averaged with up to SMOOTH - 1 before it."""
    parts = (values[max(0, i + 1 - SMOOTH) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]
