"""Results as a picture: TFLOP/s over tokens, and bandwidth of inference of few tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.layer.record import Case, Outcome, Run
from benchmarks.layer.report import bandwidth, teraflops
from benchmarks.layer.variants import DENSE

PANELS = {"forward": "forward", "both": "forward+backward", "decode": "inference of few tokens"}
COLUMNS = 3
# By variant: tokens and values.
Lines = dict[str, list[tuple[int, float]]]


def plot(run: Run, path: Path) -> None:
    """Axes for each layer and each of the PANELS that has figures: lines, or bars of one point."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    layers = list(dict.fromkeys((c.work.layer, c.work.dtype, c.work.routing) for c in run.cases))
    panels = []
    for layer in layers:
        cases = [c for c in run.cases if (c.work.layer, c.work.dtype, c.work.routing) == layer]
        cases.sort(key=lambda case: case.work.tokens)
        for panel, title in PANELS.items():
            lines = _lines(cases, panel)
            if lines:
                panels.append((f"{', '.join(layer)}: {title}", panel, lines))
    rows = max(1, -(-len(panels) // COLUMNS))
    height = 3.6 * rows + 1.6
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(16, height), squeeze=False)
    names = {o.variant: o.family for case in run.cases for o in case.outcomes}
    styles = {name: _style(i, name, family) for i, (name, family) in enumerate(names.items())}
    for ax, (title, panel, lines) in zip(axes.flat, panels, strict=False):
        ax.set_title(title, fontsize=9)
        _draw(ax, lines, panel, styles)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    _legend(figure, [line for _, _, lines in panels for line in lines], styles)
    figure.suptitle(
        f"{run.machine['device']}, {run.machine['date']}", fontsize=10, y=1 - 0.1 / height
    )
    figure.tight_layout(rect=(0, 0.9 / height, 1, 1 - 0.4 / height))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _value(case: Case, outcome: Outcome, panel: str) -> float | None:
    if panel == "decode":
        rate = bandwidth(case, outcome) if case.work.decodes else None
        return rate and rate / 1e9
    if case.work.decodes:
        return None
    kind = panel
    if panel == "forward" and "forward" not in outcome.milliseconds:
        kind = "inference"
    return teraflops(case, outcome, kind)


def _lines(cases: list[Case], panel: str) -> Lines:
    lines: Lines = {}
    for case in cases:
        for outcome in case.outcomes:
            value = _value(case, outcome, panel)
            if value:
                lines.setdefault(outcome.variant, []).append((case.work.tokens, value))
    return lines


def _style(index: int, name: str, family: str) -> dict[str, Any]:
    if name == DENSE:
        return {"color": "black", "linestyle": ":", "linewidth": 1.5}
    ours = family.startswith("ours")
    return {
        "color": f"C{index % 10}",
        "marker": "o" if ours else "^",
        "linewidth": 2.2 if ours else 1.2,
        "linestyle": "-" if ours else "--",
    }


def _draw(ax: Any, lines: Lines, panel: str, styles: dict[str, dict[str, Any]]) -> None:
    unit = "GB/s of touched weights" if panel == "decode" else "TFLOP/s"
    counts = {tokens for points in lines.values() for tokens, _ in points}
    ax.grid(alpha=0.3)
    if len(counts) == 1:
        names = list(lines)[::-1]
        values = [lines[name][0][1] for name in names]
        ax.barh(names, values, color=[styles[name]["color"] for name in names])
        ax.tick_params(axis="y", labelsize=7)
        ax.set_xlabel(f"{unit}, {counts.pop()} tokens")
        return
    for name, points in lines.items():
        ax.plot(*zip(*points, strict=True), **styles[name])
    ax.set_xscale("log", base=2)
    ax.set_xlabel("tokens")
    ax.set_ylabel(unit)
    ax.set_ylim(bottom=0)


def _legend(figure: Any, names: list[str], styles: dict[str, dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    shown = list(dict.fromkeys(names))
    handles = [Line2D([], [], **styles[name], label=name) for name in shown]
    if handles:
        figure.legend(handles=handles, loc="lower center", ncols=5, fontsize=8)
