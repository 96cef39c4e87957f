"""The routed layers of one step in a table for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from moegen.observe.history import History, Layer, Series
from moegen.report.screen import plain
from moegen.report.screen import table as empty_table

COLUMNS = {  # statistic to heading and format
    "max_over_mean": ("max/mean", ".2f"),
    "cv2": ("CV2", ".2f"),
    "normalised_entropy": ("load entropy", ".3f"),
    "unused": ("unused", "d"),
    "dropped": ("dropped", ".1%"),
    "router_entropy": ("router entropy", ".2f"),
}


def table(history: History, most: int | None = None) -> Group:
    """The last step, a line for each routed layer; of more than `most` those least even.

    There is no line of averages, because a layer that has collapsed would hide in it.
    """
    layers = sorted(range(len(history.layers)), key=lambda i: _evenness(history.layers[i]))
    shown = [history.layers[i] for i in sorted(layers[:most])]
    known = {name for layer in shown for name in layer.statistics}
    columns = {key: column for key, column in COLUMNS.items() if key in known}
    losses = list(dict.fromkeys(name for layer in shown for name in layer.losses))
    alarm = ["state"] if any(layer.collapsed[-1] for layer in shown) else []
    heads = ["layer", *alarm, *(f">{head}" for head, _ in columns.values())]
    made = empty_table(None, [*heads, *(f">{plain(name)}" for name in losses)])
    for layer in shown:
        bad = layer.collapsed[-1]
        state = ["COLLAPSED" if bad else ""] if alarm else []
        cells = [_number(layer.statistics.get(key), form) for key, (_, form) in columns.items()]
        cells += [_number(layer.losses.get(name)) for name in losses]
        made.add_row(plain(layer.name), *state, *cells, style="bold red" if bad else None)
    head = _head(history, len(shown))
    return Group(head, made) if shown else Group(head)


def _evenness(layer: Layer) -> tuple[bool, float]:
    return not layer.collapsed[-1], -float(layer.statistics["cv2"][-1] or 0)


def _head(history: History, shown: int) -> Text:
    """`step 120: loss 2.31, balance 0.0102`, and what is left out."""
    series = [("loss", history.loss), *history.losses.items()]
    known = [f"{name} {_number(values)}" for name, values in series if values[-1] is not None]
    text = f"step {history.steps[-1]}" + (": " if known else "") + ", ".join(known)
    if shown < len(history.layers):
        text += f" (the {shown} least even of {len(history.layers)} layers)"
    return plain(text)


def _number(series: Series | None, form: str = ".4g") -> str:
    value = series[-1] if series else None
    return "-" if value is None else format(value, form)
