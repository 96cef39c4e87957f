"""Scores: how well a token and an expert fit, as logits."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.init import ZEROS
from moegen.graph.builder import Builder
from moegen.spec.element import Kinds


class Score(Kinds):
    """Logits of every expert for every token."""

    default_kind: ClassVar[str | None] = "linear"

    def logits(self, b: Builder, tokens: Any, experts: int) -> Any:
        """tokens [T, d] to logits [T, E], in the router's precision."""
        raise TypeError(f"{type(self).__name__} computes nothing")


class LinearScore(Score):
    """x W, with or without a bias (Shazeer et al. 2017)."""

    kind: Literal["linear"] = "linear"
    bias: bool = Field(False, description="whether the logits have a learned bias")
    cap: float | None = Field(None, gt=0, description="bound of the logits: cap * tanh(l / cap)")

    def logits(self, b: Builder, tokens: Any, experts: int) -> Any:
        """A matrix of one row an expert."""
        dtype = b.spec.precision.router_dtype
        weight = b.param("router", experts, b.spec.model.d_model, dtype=dtype, role="router")
        bias = None
        if self.bias:
            bias = b.param("router_bias", experts, dtype=dtype, init=ZEROS, role="router")
        same = dtype == b.spec.precision.compute_dtype
        logits = F.linear(tokens if same else tokens.to(dtype), weight, bias)
        if self.cap:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits
