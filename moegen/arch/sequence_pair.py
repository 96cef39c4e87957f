"""Workloads of models that read one sequence and write another: two lengths, two sorts of token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field

from moegen.arch.model import LONGEST, Model, Side


class SequencePair(Model):
    """A model of a source and a target. Its `encode` makes what `new_cache` and `step` read."""

    max_sequence: int = Field(4096, ge=1, le=10**9, description="longest source to serve")
    max_target: int | None = Field(
        None, ge=1, le=10**9, description="longest target to serve; as max_sequence"
    )

    def length(self, asked: int | None) -> int:
        """As many source tokens as it is made to serve, at most 4,096, unless asked for."""
        return asked or min(LONGEST, self.max_sequence)

    def target(self, sequence: Any) -> Any:
        """Target tokens of a workload with so many source tokens.

        Where sizes are symbols, another than the source's: no equation of the two may hide.
        """
        if not isinstance(sequence, int):
            return sequence + 1
        return min(sequence, self.max_target or sequence)

    def seen(self, stack: str, sequence: int) -> int:
        """The source's tokens in the encoder, the target's in the decoder."""
        return int(self.target(sequence)) if self.decodes(stack) else sequence

    def decodes(self, stack: str) -> bool:
        """The encoder reads a source at once."""
        return stack != "encoder"

    def units(self, batch: int, sequence: int) -> int:
        """Tokens of both sides."""
        return batch * (sequence + int(self.target(sequence)))

    def workload(self, batch: int, sequence: int) -> str:
        """`2 x 512 source and 114 target tokens`."""
        return f"{batch} x {sequence:,} source and {self.target(sequence):,} target tokens"

    def sides(self, batch: int, sequence: int) -> tuple[Side, ...]:
        """Tokens that are read and tokens that are written, apart."""
        return (
            Side("source token", batch * sequence, "encoder"),
            Side("target token", batch * int(self.target(sequence))),
        )

    def caches(self, cache: Any, sequence: int) -> dict[str, tuple[Any, int]]:
        """What is kept of the target and of the source, apart."""
        own, across = zip(*cache.layers, strict=True)
        return {
            "cache of the target": (own, int(self.target(sequence))),
            "cache of the source": ([across, cache.source], sequence),
        }

    def examples(self, batch: Any, sequence: Any, new: int = 1) -> dict[str, Any]:
        """Inputs of each program, in the order to run them; a function of results so far."""
        target = self.target(sequence)

        def tokens(*shape: Any) -> Any:
            return torch.zeros(shape, dtype=torch.int64)

        def given() -> list[Any]:
            return [tokens(batch) for _ in self.given()]

        return {
            "shifted": lambda done: (tokens(batch, target),),
            "encode": lambda done: (tokens(batch, sequence), None, *given()),
            "new_cache": lambda done: (done["encode"], target, None),
            "step": lambda done: (tokens(batch, new), tokens(), done["new_cache"], *given()),
            "forward": lambda done: (
                *(tokens(batch, sequence), tokens(batch, target), None, None),
                *given(),
            ),
            "loss": lambda done: (done["forward"].logits, tokens(batch, target)),
            "update_balance": lambda done: (done["forward"].routing,),
        }

    def remarks(self) -> Iterator[str]:
        """What the units are."""
        yield "A token is of either side; what is told for one is the mean over all of both."
        yield "The decoder's keys and values of the source count with target tokens."
