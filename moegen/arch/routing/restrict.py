"""Restrictions: which experts a token may choose from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from moegen.graph.builder import Builder
from moegen.ops.routing import top_k
from moegen.spec.element import Kinds, Path


class Restriction(Kinds):
    """Sets the scores of forbidden experts to minus infinity, for selection only."""

    default_kind: ClassVar[str | None] = "groups"

    def allowed(self, b: Builder, scores: Any) -> Any:
        """scores [T, E], minus infinity where an expert may not be chosen."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def check(self, experts: int, chosen: int) -> Iterator[tuple[Path, str]]:
        """Rules that need the number of experts and of choices."""
        yield from ()


class Groups(Restriction):
    """The best groups of experts only: DeepSeek-V2 (by max), DeepSeek-V3 (by top2_sum)."""

    kind: Literal["groups"] = "groups"
    groups: int = Field(ge=1, description="groups of equal size that the experts form")
    keep: int = Field(ge=1, description="groups a token may choose from")
    by: Literal["max", "top2_sum"] = Field("max", description="what ranks the groups")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """No more groups kept than there are."""
        if self.keep > self.groups:
            yield ("keep",), f"keep is {self.keep} but there are only {self.groups} groups"

    def check(self, experts: int, chosen: int) -> Iterator[tuple[Path, str]]:
        """Groups of equal size, with enough experts in those kept."""
        if experts % self.groups:
            yield ("groups",), f"groups ({self.groups}) must divide the {experts} experts"
            return
        size = experts // self.groups
        if self.by == "top2_sum" and size < 2:
            yield ("by",), f"top2_sum needs two experts a group, but groups have {size}"
        if self.keep * size < chosen:
            sentence = f"{self.keep} x {size} experts are fewer than the {chosen} that are chosen"
            yield ("keep",), sentence

    def allowed(self, b: Builder, scores: Any) -> Any:
        """Minus infinity outside the best `keep` groups."""
        grouped = scores.unflatten(-1, (self.groups, -1))
        pair = self.by == "top2_sum"
        rank = grouped.topk(2, dim=-1).values.sum(-1) if pair else grouped.amax(-1)
        best = top_k(rank, self.keep)
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
