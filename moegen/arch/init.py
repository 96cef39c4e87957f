"""Initialisation: from which distribution parameters start."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from moegen.graph.component import Init
from moegen.spec.element import Element


class Initialization(Element):
    """How weight matrices start; norms start at one and biases at zero.

    kind "normal": N(0, std^2). kind "truncated": truncated normal with
    sigma = sqrt(scale / fan_in), cut at two sigma (Switch Transformer section 2.4, where
    scale is 0.1).
    """

    kind: Literal["normal", "truncated"] = Field("normal", description="the distribution")
    std: float = Field(0.02, gt=0, le=10, description="standard deviation of kind normal")
    scale: float = Field(1.0, gt=0, le=100, description="s of sqrt(s / fan_in), kind truncated")
    embedding_std: float | None = Field(None, gt=0, le=10, description="for embeddings alone")
    router_std: float | None = Field(None, ge=0, le=10, description="for routers alone")

    def of(self, shape: tuple[int, ...], role: str) -> Init:
        """How a weight of this shape and role starts; fan_in is its last dimension."""
        special = {"embedding": self.embedding_std, "router": self.router_std}.get(role)
        if special is not None:
            return normal(special)
        if self.kind == "normal":
            return normal(self.std)
        sigma = math.sqrt(self.scale / shape[-1])
        bounds = (("std", sigma), ("a", -2 * sigma), ("b", 2 * sigma))
        return Init("trunc_normal_", bounds)


def normal(std: float) -> Init:
    """N(0, std^2)."""
    return Init("normal_", (("std", std),)) if std else ZEROS


ONES = Init("ones_")
ZEROS = Init("zeros_")
