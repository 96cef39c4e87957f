"""Scalars for TensorBoard, or for anything else with its add_scalar."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Protocol

from moegen.errors import MoegenError, Problem
from moegen.observe.history import History, Series


class Writer(Protocol):
    """What is asked of a SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Take one value."""


def write_scalars(
    history: History, writer: Writer | str | os.PathLike[str], after: int | None = None
) -> None:
    """Write every series to a writer, or into a folder; only steps past `after` if it is given."""
    if isinstance(writer, (str, os.PathLike)):
        with _summary_writer(writer) as made:
            write_scalars(history, made, after)
        return
    if not hasattr(writer, "add_scalar"):
        raise MoegenError(f"a {type(writer).__name__} has no add_scalar, so it takes no scalars")
    for tag, series in tagged(history):
        for step, value in zip(history.steps, series, strict=True):
            if value is not None and (after is None or step > after):
                writer.add_scalar(tag, value, step)


def tagged(history: History) -> Iterator[tuple[str, Series]]:
    """Every series with its tag: a section for each statistic, in it a chart for each layer."""
    yield "loss/total", history.loss
    yield from ((f"loss/{name}", series) for name, series in history.losses.items())
    for layer in history.layers:
        for name, series in layer.statistics.items():
            yield f"{name}/layer {layer.name}", series
        for name, series in layer.losses.items():
            yield f"{name} of layers/layer {layer.name}", series
        yield f"collapsed/layer {layer.name}", [float(bad) for bad in layer.collapsed]


def _summary_writer(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        hint = "pip install tensorboard, or give an object with add_scalar"
        raise MoegenError(Problem("TensorBoard is not installed here", hint=hint)) from error
    make: Any = SummaryWriter  # its signatures are not typed
    return make(str(folder))
