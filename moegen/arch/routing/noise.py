"""Noise: what a router adds in training so that experts are explored."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from moegen.graph.builder import Builder
from moegen.ops.noise import jitter
from moegen.spec.element import Kinds


class Noise(Kinds):
    """Randomness at two points of a router: on its input, and on its logits."""

    default_kind: ClassVar[str | None] = "jitter"

    def on_input(self, b: Builder, tokens: Any) -> Any:
        """tokens [T, d] as the router sees them; the experts see them as they are."""
        return tokens

    def on_logits(self, b: Builder, logits: Any) -> Any:
        """logits [T, E] as selection and gates see them."""
        return logits


class Jitter(Noise):
    """Multiply the router's input by U(1 - eps, 1 + eps) (Switch Transformer section 2.4)."""

    shorthand = "eps"

    kind: Literal["jitter"] = "jitter"
    eps: float = Field(0.01, gt=0, lt=1, description="half width of the uniform factor")

    def on_input(self, b: Builder, tokens: Any) -> Any:
        """Jittered in training."""
        return jitter(tokens, self.eps, b.training)
