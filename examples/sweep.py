"""Sweeps granularity: finer experts at equal parameters, and what that changes and costs.

Run from the repository root as `python -m examples.sweep`. One expert of width n becomes m of
width n/m, and a token takes m times as many (DeepSeekMoE, arXiv:2401.06066). Shared experts are
as fine and m times as many, too. Experts keep their parameters and FLOPs, the ways to combine them
multiply, and the router grows.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import moegen

GRANULARITIES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Row:
    """One granularity and what the estimate says of it."""

    granularity: int
    experts: int
    chosen: int
    total: int
    active: int
    router: int
    flops: float  # of training, for one token

    @property
    def combinations(self) -> float:
        """Ways to choose experts for a token, as a power of ten."""
        return math.log10(math.comb(self.experts, self.chosen))


def rows(spec: str, granularities: Sequence[int]) -> list[Row]:
    """One estimate a granularity."""
    made = []
    for granularity in granularities:
        finer = {"moe.granularity": granularity, "moe.shared.count": granularity}
        estimate = moegen.estimate(spec, finer)
        moe = estimate.plan.spec.model.routed()[0].moe
        counts = estimate.counts
        made.append(
            Row(
                granularity,
                moe.num_experts,
                moe.chosen,
                counts.total,
                counts.active,
                counts.by_role["router"].count,
                float(estimate.training_flops),
            )
        )
    return made


def table(found: Sequence[Row]) -> Table:
    """The rows for a screen."""
    made = Table(title="granularity, parameters and FLOPs of one token")
    for head in ("m", "experts", "k", "total", "active", "router", "MFLOPs", "combinations"):
        made.add_column(head, justify="right")
    for row in found:
        counts = (row.total, row.active, row.router)
        made.add_row(
            *map(str, (row.granularity, row.experts, row.chosen)),
            *(f"{count:,}" for count in counts),
            f"{row.flops / 1e6:.3f}",
            f"10^{row.combinations:.1f}",
        )
    return made


def save_plot(found: Sequence[Row], place: Path) -> bool:
    """Parameters and FLOPs relative to m = 1, and the combinations, over m; needs matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    costs, ways = figure.subplots(1, 2)
    m, first = [row.granularity for row in found], found[0]
    costs.plot(m, [row.total / first.total for row in found], "o-", label="parameters")
    costs.plot(m, [row.active / first.active for row in found], "o-", label="active parameters")
    costs.plot(m, [row.flops / first.flops for row in found], "o-", label="training FLOPs")
    costs.set(xscale="log", xlabel="granularity m", ylabel="relative to the coarsest")
    costs.legend()
    ways.plot(m, [row.combinations for row in found], "o-")
    ways.set(xscale="log", xlabel="granularity m", ylabel="log10 of ways to choose k of E")
    for axes in (costs, ways):
        axes.set_xticks(m, [str(value) for value in m])
        axes.minorticks_off()
    figure.savefig(place, dpi=120)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", default="specs/tiny.yaml")
    parser.add_argument("--granularity", type=int, nargs="+", default=list(GRANULARITIES))
    parser.add_argument("--out", type=Path, default=Path("generated/sweep"))
    chosen = parser.parse_args(arguments)
    found = rows(chosen.spec, chosen.granularity)
    Console().print(table(found))
    chosen.out.mkdir(parents=True, exist_ok=True)
    place = chosen.out / "granularity.png"
    if save_plot(found, place):
        print(f"wrote {place}")


if __name__ == "__main__":
    main()
