"""The recorder: takes what each step did without waiting, and shows it when asked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from torch import Tensor

from moegen.emit.files import put
from moegen.errors import MoegenError, Problem
from moegen.observe.history import History, history
from moegen.observe.page import page
from moegen.observe.rows import Row, row, to_host
from moegen.observe.table import StepTable
from moegen.observe.tensorboard import Writer, write_scalars

_AROUND = 6  # lines of a live table beside those of layers


class Recorder:
    """What the routed layers of any emitted model did, step by step.

    `record` copies a few small tensors on their device and never waits for it; all that shows
    them moves what is new to the host at once. Of many steps every second is given up, again
    and again, so that at most `most` are kept, evenly spaced, and the newest.

    layers: names of the routed layers, such as `model.routed_layers()`; else 1, 2, ...
    """

    def __init__(self, layers: Iterable[object] | None = None, *, most: int = 1000) -> None:
        """Start with nothing recorded."""
        self._given = None if layers is None else tuple(map(str, layers))
        self._most = max(2, most)
        self._rows: list[Row] = []  # one in `stride` steps, and after them the newest
        self._stride = 1
        self._seen = 0  # steps
        self._redraw: tuple[int, Callable[[], None]] | None = None
        self._told: tuple[Any, int] | None = None

    def record(
        self,
        step: int,
        routing: Iterable[Any],
        *,
        losses: Mapping[str, Tensor | float] | None = None,
        loss: Tensor | float | None = None,
    ) -> None:
        """Keep a step: an Output's routing and losses, and the total loss (nats a token).

        Steps come in order. A step that comes again is another micro-batch of it: its loads are
        added, and the mean is taken of all else.
        """
        new = row(step, routing, losses or {}, loss)
        if not self._rows:
            self._rows, self._seen = [new], 1
            self._names()
            return
        last = self._rows[-1]
        if _experts(new) != _experts(last):
            raise _misfit(f"{_experts(last)} experts in its layers, now {_experts(new)}")
        if step < last.step:
            raise _misfit(f"step {last.step} already, so not step {step}")
        if step == last.step:
            if new.sizes.keys() != last.sizes.keys():
                raise _misfit(f"other losses of step {step}")
            last.add(new)
            return
        if self._redraw and self._seen % self._redraw[0] == 0:
            self._redraw[1]()
        if (self._seen - 1) % self._stride:
            self._rows.pop()
        self._rows.append(new)
        self._seen += 1
        if len(self._rows) > self._most:
            self._rows = [*self._rows[:-1:2], self._rows[-1]]
            self._stride *= 2

    def history(self) -> History:
        """All steps that are kept, as series on the host."""
        return history(self._on_host(), self._names())

    def table(self, layers: int | None = None) -> StepTable:
        """The newest step, a line for each routed layer; of more than `layers` the least even."""
        return StepTable(history(self._on_host()[-1:], self._names()), layers)

    def show(self, screen: Console | None = None) -> None:
        """Print the table."""
        (screen or Console(highlight=False)).print(self.table())

    @contextmanager
    def live(self, every: int = 10, screen: Console | None = None) -> Iterator[None]:
        """Keep the table below what is printed, and redraw it every so many steps."""
        with Live(console=screen, auto_refresh=False) as shown:
            rows = max(1, shown.console.height - _AROUND)

            def redraw() -> None:
                shown.update(self.table(rows), refresh=True)

            self._redraw = (max(1, every), redraw)
            try:
                yield
            finally:
                self._redraw = None
                if self._rows:
                    redraw()

    def to_tensorboard(self, writer: Writer | str | os.PathLike[str]) -> None:
        """Write scalars to anything with add_scalar, such as a SummaryWriter, or into a folder.

        A writer that is given again gets only the steps that are new to it.
        """
        found = self.history()
        last = self._told[1] if self._told and self._told[0] is writer else None
        write_scalars(found, writer, last)
        self._told = (writer, found.steps[-1])

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write everything that is kept as JSON, whole or not at all."""
        return _put(path, json.dumps(self.history().data(), allow_nan=False) + "\n")

    def to_html(self, path: str | os.PathLike[str], title: str = "Routing") -> Path:
        """Write one page with all of it, which opens nothing else; whole or not at all."""
        return _put(path, page(self.history(), title))

    def _on_host(self) -> Sequence[Row]:
        if not self._rows:
            hint = "call recorder.record(step, output.routing) in each step"
            raise MoegenError(Problem("nothing has been recorded yet", hint=hint))
        to_host(self._rows)
        return self._rows

    def _names(self) -> tuple[str, ...]:
        count = len(_experts(self._rows[0]))
        names = self._given or tuple(str(number + 1) for number in range(count))
        if len(names) != count:
            raise MoegenError(f"{len(names)} names were given, but {count} layers are routed")
        return names


def _experts(row: Row) -> list[int]:
    """How many experts each routed layer has."""
    return [size for key, size in row.sizes.items() if key[1] == "load"]


def _misfit(sentence: str) -> MoegenError:
    hint = "use a Recorder for each model and each purpose"
    return MoegenError(Problem(f"this recorder has seen {sentence}", hint=hint))


def _put(path: str | os.PathLike[str], text: str) -> Path:
    place = Path(path)
    try:
        put(place, text)
    except OSError as error:
        raise MoegenError(f"cannot write {place}: {error.strerror or error}") from error
    return place
