"""Selection: which tokens meet which experts."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import ClassVar

from moegen.arch.routing.routed import Mixture, Routed, Scored
from moegen.graph.builder import Builder
from moegen.spec.element import Kinds, Path


class Selection(Kinds):
    """Makes the assignment of tokens to experts from their scores."""

    default_kind: ClassVar[str | None] = "top_k"
    causal: ClassVar[bool] = True
    tokens_choose: ClassVar[bool] = True  # and not experts, or slots
    by_logits: ClassVar[bool] = False  # whether these, and not scores, are ranked
    even_loads: ClassVar[bool] = False  # whatever scores are
    takes_capacity: ClassVar[bool] = False
    takes_groups: ClassVar[tuple[str, ...]] = ("batch",)  # of tokens that compete

    def route(self, b: Builder, moe: Mixture, scored: Scored) -> Routed:
        """Rows for the experts, and the way back."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def active(self, moe: Mixture) -> Fraction:
        """The fraction of the experts that a token meets, on average."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def logits(self, experts: int) -> int:
        """How many logits a token has."""
        return experts

    def chosen(self, granularity: int, experts: int) -> int:
        """Experts that a token chooses; 0 where tokens do not choose."""
        return 0

    def check(self, experts: int, granularity: int) -> Iterator[tuple[Path, str]]:
        """Rules that need the number of experts."""
        yield from ()
