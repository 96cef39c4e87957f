"""What was recorded, on the host: series over steps, for the model and for each routed layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moegen.emit.runtime.network import load_statistics
from moegen.observe.rows import MODEL, Key, Row

Series = list[float | None]  # a value for each step, None where there was none

# Over what chance gives: a squared coefficient of variation of loads that says half of the experts
# could do all of the work, and a share of experts that do none.
_EXCESS = 1.0
_UNUSED = 0.25


@dataclass(frozen=True)
class Layer:
    """One routed layer over the steps."""

    name: str
    load: Tensor  # [steps, E], choices of real tokens for each expert
    collapsed: list[bool]
    statistics: dict[str, Series]  # those of load_statistics, dropped, router_entropy (nats)
    losses: dict[str, Series]  # the layer's own, not weighted


@dataclass(frozen=True)
class History:
    """All routed layers over the steps, and the losses of the whole model."""

    steps: tuple[int, ...]
    loss: Series
    losses: dict[str, Series]  # as the model's Output has them
    layers: tuple[Layer, ...]

    def data(self, detailed: Sequence[int] | None = None) -> dict[str, Any]:
        """Everything as JSON has it: no NaN, no infinity.

        detailed: places in `steps` where experts' loads are given; everywhere by default.
        """
        places = list(range(len(self.steps)) if detailed is None else detailed)
        return {
            "steps": list(self.steps),
            "loss": _finite(self.loss),
            "losses": {name: _finite(series) for name, series in self.losses.items()},
            "layers": [
                {
                    "name": layer.name,
                    "experts": layer.load.shape[-1],
                    "collapsed": layer.collapsed,
                    "statistics": {n: _finite(s) for n, s in layer.statistics.items()},
                    "losses": {n: _finite(s) for n, s in layer.losses.items()},
                    "load": layer.load[places].long().tolist(),
                }
                for layer in self.layers
            ],
        }


class _Rows:
    """Rows that are on the host, read by key."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.places = [row.places() for row in rows]
        self.numbers = [row.values.tolist() for row in rows]
        self.keys = dict.fromkeys(key for places in self.places for key in places)

    def series(self, key: Key) -> Series:
        """One value of each row, the mean over micro-batches."""
        found = zip(self.rows, self.places, self.numbers, strict=True)
        return [n[at[key]] / row.parts if key in at else None for row, at, n in found]

    def losses(self, layer: int) -> dict[str, Series]:
        """The losses of a layer or of the model."""
        return {key[2]: self.series(key) for key in self.keys if key[:2] == (layer, "loss")}

    def layer(self, index: int, name: str) -> Layer:
        """All of a routed layer; loads are the sums over micro-batches."""
        key = (index, "load", "")
        found = zip(self.rows, self.places, strict=True)
        load = torch.stack([row.values.narrow(0, at[key], row.sizes[key]) for row, at in found])
        statistics: dict[str, Series] = {n: v.tolist() for n, v in load_statistics(load).items()}
        for what in ("dropped", "router_entropy"):
            if (index, what, "") in self.keys:
                statistics[what] = self.series((index, what, ""))
        return Layer(name, load, collapsed(load).tolist(), statistics, self.losses(index))


def history(rows: Sequence[Row], names: Sequence[str]) -> History:
    """The series of rows that are on the host, and whose routed layers have these names."""
    found = _Rows(rows)
    return History(
        steps=tuple(row.step for row in rows),
        loss=found.series((MODEL, "total", "")),
        losses=found.losses(MODEL),
        layers=tuple(found.layer(index, name) for index, name in enumerate(names)),
    )


def collapsed(load: Tensor) -> Tensor:
    """Which of some loads [steps, E] look as if the router had collapsed: [steps] bool.

    A few tokens are spread unevenly over many experts by chance alone. So what counts is by how
    much the variance, or the number of unused experts, exceeds that of choices made evenly at
    random.
    """
    found = load_statistics(load)
    experts, choices = load.shape[-1], load.sum(-1)
    variance = found["cv2"] - (experts - 1) / choices
    unused = found["unused"] - experts * (1 - 1 / experts) ** choices
    return (variance > _EXCESS) | (unused > _UNUSED * experts)


def _finite(series: Iterable[float | None]) -> Series:
    return [x if x is not None and math.isfinite(x) else None for x in series]
