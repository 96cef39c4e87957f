"""Results as a picture: TFLOP/s over tokens, and bandwidth of decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.layer.record import Case, Run
from benchmarks.layer.report import bandwidth, teraflops
from benchmarks.layer.variants import DENSE

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


def _style(index: int, family: str) -> dict[str, Any]:
    ours = family.startswith("ours")
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": "o" if ours else "^",
        "linewidth": 2.2 if ours else 1.2,
        "linestyle": "-" if ours else "--",
    }


def plot(run: Run, path: Path) -> None:
    """One row of axes a layer: forward, forward+backward, and inference of few tokens."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    layers = list(dict.fromkeys((c.work.layer, c.work.dtype, c.work.routing) for c in run.cases))
    names = list(dict.fromkeys((o.variant, o.family) for c in run.cases for o in c.outcomes))
    columns = ("forward", "both", "decode")
    figure, axes = plt.subplots(
        len(layers), len(columns), figsize=(15, 3.6 * len(layers)), squeeze=False
    )
    for row, layer in zip(axes, layers, strict=True):
        cases = [c for c in run.cases if (c.work.layer, c.work.dtype, c.work.routing) == layer]
        for ax, column in zip(row, columns, strict=True):
            _draw(ax, sorted(cases, key=lambda c: c.work.tokens), column, names)
            title = {"both": "forward+backward", "decode": "inference, few tokens"}
            ax.set_title(f"{', '.join(layer)}: {title.get(column, column)}", fontsize=9)
    handles: dict[str, Any] = {}
    for ax in axes.flat:
        handles |= {line.get_label(): line for line in ax.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{run.machine['device']}, {run.machine['date']}", fontsize=10)
    figure.tight_layout(rect=(0, 0.02 + 0.35 / len(layers) ** 1.2, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(ax: Any, cases: list[Case], column: str, names: list[tuple[str, str]]) -> None:
    for index, (name, family) in enumerate(names):
        points = []
        for case in cases:
            outcome = case.outcome(name)
            if outcome is None or outcome.state != "right":
                continue
            if case.work.decodes != (column == "decode"):
                continue
            rate = bandwidth(case, outcome) if column == "decode" else None
            value = rate and rate / 1e9
            if column != "decode":
                kind = "inference" if "forward" not in outcome.milliseconds else "forward"
                value = teraflops(case, outcome, kind if column == "forward" else column)
            if value:
                points.append((case.work.tokens, value))
        if points:
            style = _style(index, family)
            if name == DENSE:
                style |= {"color": "black", "marker": "", "linestyle": ":"}
            ax.plot(*zip(*points, strict=True), label=name, **style)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("tokens")
    ax.set_ylabel("GB/s of touched weights" if column == "decode" else "TFLOP/s")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
