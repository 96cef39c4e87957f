"""Recurrent layers: what carries a state from one token to the next."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from moegen.graph.builder import Builder
from moegen.graph.component import Init
from moegen.ops.recurrence import lstm, lstm_step
from moegen.spec.element import Kinds, Path
from moegen.spec.words import counted


class Recurrence(Kinds):
    """A layer that reads a sequence token by token and carries a state."""

    default_kind: ClassVar[str | None] = "lstm"

    def check(self, d_model: int) -> Iterator[tuple[Path, str]]:
        """What it needs of the stream's width."""
        yield from ()

    def sentence(self, d_model: int) -> str:
        """What it is, in words."""
        return self.kind

    def over(self, b: Builder, x: Any) -> Any:
        """x [B, S, d] to [B, S, d], from an empty state."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def onward(self, b: Builder, x: Any, state: Any) -> Any:
        """x [B, T, d] to [B, T, d] from a state, which is then that after the last of them."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def empty(self, b: Builder, batch: Any) -> Any:
        """The state before the first token."""
        raise TypeError(f"{type(self).__name__} computes nothing")


class LSTM(Recurrence):
    """Long short-term memory, with the parameters of torch.nn.LSTM (Hochreiter et al. 1997).

    Units that are more than the stream is wide are projected to its width (Sak et al. 2014).
    """

    shorthand = "width"

    kind: Literal["lstm"] = "lstm"
    width: int | None = Field(
        None, ge=1, le=10**6, description="units; d_model unless said, or more, then projected"
    )
    bias: bool = Field(True, description="whether the gates have the two biases of torch.nn.LSTM")

    def check(self, d_model: int) -> Iterator[tuple[Path, str]]:
        """A residual connection needs outputs as wide as the stream."""
        if self.width is not None and self.width < d_model:
            sentence = f"{counted(self.width, 'unit')} cannot be added to a stream {d_model} wide"
            yield ("width",), f"{sentence}; leave width out, or say more, which are projected"

    def units(self, d_model: int) -> int:
        """H: units of one layer."""
        return self.width or d_model

    def sentence(self, d_model: int) -> str:
        """`LSTM of 4096 units, projected to 1024`."""
        units = self.units(d_model)
        projected = f", projected to {d_model}" if units != d_model else ""
        return f"LSTM of {units} units{projected}"

    def over(self, b: Builder, x: Any) -> Any:
        """All steps in one call."""
        weights, named = self._weights(b)
        return lstm(x, *weights, **named)

    def onward(self, b: Builder, x: Any, state: Any) -> Any:
        """A few steps more."""
        weights, named = self._weights(b)
        return lstm_step(x, state[0], state[1], *weights, **named)

    def empty(self, b: Builder, batch: Any) -> Any:
        """Zeros: the last output [B, d] and the cells [B, H]."""
        weight = b.param("weight_hh", *self._recurrent(b), init=self._start(b))
        dtype = b.spec.precision.compute_dtype
        hidden = torch.zeros((batch, b.width), dtype=dtype, device=weight.device)
        cells = (batch, self.units(b.width))
        return hidden, torch.zeros(cells, dtype=dtype, device=weight.device)

    def _recurrent(self, b: Builder) -> tuple[int, int]:
        return 4 * self.units(b.width), b.width

    def _start(self, b: Builder) -> Init:
        """As torch.nn.LSTM starts: evenly within one over the root of its units."""
        bound = 1 / math.sqrt(self.units(b.width))
        return Init("uniform_", (("a", -bound), ("b", bound)))

    def _weights(self, b: Builder) -> tuple[list[Any], dict[str, Any]]:
        """Parameters by position, and by name."""
        units, start = self.units(b.width), self._start(b)
        found = [
            b.param("weight_ih", 4 * units, b.width, init=start),
            b.param("weight_hh", *self._recurrent(b), init=start),
        ]
        if self.bias:
            found.append(b.param("bias_ih", 4 * units, init=start))
            found.append(b.param("bias_hh", 4 * units, init=start))
        if units == b.width:
            return found, {}
        return found, {"weight_hr": b.param("weight_hr", b.width, units, init=start)}
