"""Gates: the weights with which the chosen experts' outputs are summed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from moegen.graph.builder import Builder
from moegen.spec.element import Element


class Gate(Element):
    """Weights of the chosen experts.

    none: their scores as they are (Switch, V-MoE, DeepSeek-V2). sum: divided by their sum
    (GShard, DeepSeek-V3). softmax_over_kept: a softmax over the chosen logits (Shazeer 2017,
    Mixtral, gpt-oss); of softmax scores it equals sum in value and gradient.
    """

    shorthand = "normalize"

    normalize: Literal["none", "sum", "softmax_over_kept"] = Field(
        "none", description="how the chosen experts' scores become weights"
    )
    scale: float = Field(1.0, gt=0, le=1e6, description="factor on the weights, last")
    eps: float = Field(0.0, ge=0, lt=1, description="added to the sum that sum divides by")

    def weights(self, b: Builder, logits: Any, scores: Any, experts: Any) -> Any:
        """Weights [T, k] of the chosen experts [T, k], from logits and scores [T, E]."""
        if self.normalize == "softmax_over_kept":
            weights = logits.gather(-1, experts).softmax(-1)
        else:
            weights = scores.gather(-1, experts)
        if self.normalize == "sum":
            total = weights.sum(-1, keepdim=True)
            weights = weights / (total + self.eps if self.eps else total)
        return weights * self.scale if self.scale != 1.0 else weights
