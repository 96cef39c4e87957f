"""The routed layers of one step in a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from moegen.observe.history import History, Layer, Series
from moegen.report import screen

_COLUMNS = {  # statistic to heading and format
    "max_over_mean": ("max/mean", ".2f"),
    "cv2": ("CV2", ".2f"),
    "normalised_entropy": ("load\nentropy", ".3f"),
    "unused": ("unused", "d"),
    "dropped": ("dropped", ".1%"),
    "router_entropy": ("router\nentropy", ".2f"),
}
_WIDEST = 10_000
Column = tuple[str, list[str]]  # heading and cells


@dataclass(frozen=True)
class StepTable:
    """The last step of a history, a line for each routed layer; of more than `most` the least even.

    There is no line of averages, because a layer that has collapsed would hide in it. Columns that
    do not fit beside the others stand below them, so that no number is cut.
    """

    history: History
    most: int | None = None

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """What is printed."""
        layers = self._shown()
        yield self._head(len(layers))
        rest = _columns(layers) if layers else []
        wide = options.update_width(_WIDEST)
        while rest:
            parts = (_part(layers, rest[:count]) for count in range(len(rest), 1, -1))
            fits = (
                p for p in parts if Measurement.get(console, wide, p).maximum <= options.max_width
            )
            part = next(fits, None) or _part(layers, rest[:1])
            yield part
            rest = rest[len(part.columns) - 1 :]

    def _shown(self) -> list[Layer]:
        layers = self.history.layers
        order = sorted(range(len(layers)), key=lambda index: _evenness(layers[index]))
        return [layers[index] for index in sorted(order[: self.most])]

    def _head(self, shown: int) -> Text:
        """`step 120: loss 2.31, balance 0.0102`, and what is left out."""
        history = self.history
        series = [("loss", history.loss), *history.losses.items()]
        known = [f"{name} {_number(values)}" for name, values in series if values[-1] is not None]
        text = f"step {history.steps[-1]}" + (": " if known else "") + ", ".join(known)
        if shown < len(history.layers):
            text += f" (the {shown} least even of {len(history.layers)} layers)"
        return screen.plain(text)


def _columns(layers: Sequence[Layer]) -> list[Column]:
    """Statistics that any layer has, and after them the layers' own losses."""
    known = {name for layer in layers for name in layer.statistics}
    losses = dict.fromkeys(name for layer in layers for name in layer.losses)
    return [
        *(
            (heading, [_number(layer.statistics.get(name), form) for layer in layers])
            for name, (heading, form) in _COLUMNS.items()
            if name in known
        ),
        *(
            (str(screen.plain(name)), [_number(layer.losses.get(name)) for layer in layers])
            for name in losses
        ),
    ]


def _part(layers: Sequence[Layer], columns: Sequence[Column]) -> Table:
    """The table of some columns, beside the layers' names."""
    made = screen.table(None, ["layer", *(f">{heading}" for heading, _ in columns)])
    for index, layer in enumerate(layers):
        bad = layer.collapsed[-1]
        name = screen.plain(f"{layer.name} COLLAPSED" if bad else layer.name)
        cells = (cells[index] for _, cells in columns)
        made.add_row(name, *cells, style="bold red" if bad else None)
    return made


def _evenness(layer: Layer) -> tuple[bool, float]:
    return not layer.collapsed[-1], -float(layer.statistics["cv2"][-1] or 0)


def _number(series: Series | None, form: str = ".4g") -> str:
    value = series[-1] if series else None
    return "-" if value is None else format(value, form)
