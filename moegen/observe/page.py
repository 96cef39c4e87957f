"""A page of HTML that shows a history, in one file that opens nothing else."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

from moegen.errors import visible
from moegen.observe.history import History

_CELLS = 400_000  # loads of experts that a page holds; more make it slow to open
_DIGITS = 5


def page(history: History, title: str) -> str:
    """The text of the page. Without its script it still has the last step as a table."""
    experts = sum(layer.load.shape[-1] for layer in history.layers)
    detailed = _spread(len(history.steps), max(2, _CELLS // max(1, experts)))
    data = {**_short(history.data(detailed)), "detailed": detailed}
    parts = {"title": _text(title), "table": _table(data), "data": _embedded(data)}
    text = _resource("page.html")
    parts |= {"style": _resource("page.css"), "script": _resource("page.js")}
    # Split at the marks of the template, so that nothing that is put in is read for marks.
    pieces = text.split("@@")
    return "".join(parts[p] if i % 2 else p for i, p in enumerate(pieces))


def _resource(name: str) -> str:
    return (resources.files("moegen.observe") / name).read_text(encoding="utf-8")


def _text(value: object) -> str:
    return html.escape(visible(str(value)))


def _embedded(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element that it stands in, nor begin a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the first whole numbers, evenly spaced, the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _short(value: Any) -> Any:
    """The same data with numbers rounded to few digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    return [_short(part) for part in value] if isinstance(value, list) else value


def _table(data: dict[str, Any]) -> str:
    """The last step, a line for each routed layer."""
    layers = data["layers"]
    groups = [
        (group, list(dict.fromkeys(name for layer in layers for name in layer[group])))
        for group in ("statistics", "losses")
    ]
    heads = ["layer", "experts", *(name for _, names in groups for name in names)]
    lines = [_line("th", heads)]
    for layer in layers:
        cells = [layer["name"], layer["experts"]]
        for group, names in groups:
            cells += [layer[group].get(name, [None])[-1] for name in names]
        bad = layer["collapsed"][-1]
        lines.append(_line("td", cells, ' class="collapsed"' if bad else ""))
    return "\n".join(lines)


def _line(tag: str, cells: list[Any], attributes: str = "") -> str:
    texts = ("-" if cell is None else _text(cell) for cell in cells)
    return f"<tr{attributes}>{''.join(f'<{tag}>{text}</{tag}>' for text in texts)}</tr>"
