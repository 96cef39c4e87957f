"""Positions that are not rotary: biases of attention's logits, or vectors added to tokens'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field

from moegen.graph.builder import Builder
from moegen.ops.biased_attention import relative_buckets, sinusoidal_positions
from moegen.spec.element import Kinds, Path


class SequencePositions(Kinds):
    """How a model of stacks knows where a token stands, if attention does not turn its heads."""

    default_kind: ClassVar[str | None] = "relative"

    def check(self, d_model: int) -> Iterator[tuple[Path, str]]:
        """Rules that need the model's width."""
        yield from ()


class Relative(SequencePositions):
    """A learned bias of each head's logits for the distance of two tokens, in buckets (T5 2020).

    Half of the buckets are for distances one by one, half for ranges that grow to max_distance.
    """

    kind: Literal["relative"] = "relative"
    buckets: int = Field(32, ge=4, le=10**4, description="ranges of distances with a bias each")
    max_distance: int = Field(
        128, ge=2, le=10**7, description="all tokens further away share a bucket"
    )
    per_layer: bool = Field(False, description="a table in each layer, not one for a whole stack")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """Buckets that halve twice, and distances beyond those that have one each."""
        if self.buckets % 4:
            yield ("buckets",), f"buckets must be a multiple of 4, not {self.buckets}"
        elif self.max_distance <= self.buckets // 2:
            single = self.buckets // 2
            yield (
                ("max_distance",),
                f"max_distance is {self.max_distance} but {single} distances have a bucket each",
            )

    def buckets_of(self, queries: Any, keys: Any, bidirectional: bool) -> Any:
        """Buckets [T, S] of the distances from positions [T] to positions [S]."""
        return relative_buckets(queries, keys, bidirectional, self.buckets, self.max_distance)

    def bias(self, b: Builder, buckets: Any, heads: int) -> Any:
        """The bias [1, H, T, S] of buckets [T, S], from the table of this component."""
        table = b.param("position_bias", self.buckets, heads, role="attention")
        return F.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0)


class Sinusoidal(SequencePositions):
    """Sines and cosines of the position, added to the token's vector (Vaswani et al. 2017)."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    offset: int = Field(
        0, ge=0, le=10**6, description="position of the first token (fairseq: padding's id + 1)"
    )
    longest: float = Field(1e4, gt=1, le=1e9, description="the longest wavelength over 2 pi")

    def check(self, d_model: int) -> Iterator[tuple[Path, str]]:
        """A sine and a cosine for each wavelength."""
        if d_model % 2:
            yield (), f"sinusoidal positions need an even d_model, not {d_model}"

    def vectors(self, b: Builder, positions: Any, width: int) -> Any:
        """Vectors [S, width] of positions [S]."""
        places = positions + self.offset if self.offset else positions
        return sinusoidal_positions(places, width, self.longest, b.spec.precision.compute_dtype)
