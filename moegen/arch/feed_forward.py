"""Feed-forward networks: dense layers, shared experts, and the network beside an MoE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field

from moegen.arch.activation import Activation, SwiGLU
from moegen.arch.init import ZEROS
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.graph.layer import Layer
from moegen.spec.element import Element, OneOf
from moegen.spec.words import counted


class FeedForward(Layer):
    """Two projections with an activation between; three where the activation is gated."""

    shorthand = "width"

    width: int = Field(ge=1, le=10**7, description="hidden width", examples=[4096])
    activation: Annotated[Activation, OneOf(Activation)] = Field(
        SwiGLU(), description="activation, e.g. swiglu, relu"
    )
    bias: bool = Field(False, description="whether the projections have a bias")

    def describe(self, spec: Any) -> str:
        """`Feed-forward network: swiglu, 18432 wide.`"""
        return f"Feed-forward network: {self.activation.kind}, {self.width} wide."

    def forward(self, b: Builder, x: Any) -> Any:
        """x [..., d] to [..., d]."""
        if self.activation.gated:
            gate = self._linear(b, "gate", x)
            up = self._linear(b, "up", x)
            hidden = self.activation.apply(gate, up)
        else:
            hidden = self.activation.apply(self._linear(b, "up", x))
        d_model = b.width
        bias = b.param("down_bias", d_model, init=ZEROS) if self.bias else None
        return F.linear(hidden, b.param("down", d_model, self.width), bias)

    def _linear(self, b: Builder, name: str, x: Any) -> Any:
        bias = b.param(f"{name}_bias", self.width, init=ZEROS) if self.bias else None
        return F.linear(x, b.param(name, self.width, b.width), bias)


class ResidualFeedForward(FeedForward):
    """A dense network whose output is added to a routed one's (Arctic 2024)."""

    def says(self, setting: Setting) -> Iterator[str]:
        """What is added."""
        yield (
            f"The output of a dense network ({self.activation.kind}, {self.width:,} wide) for the "
            "same token is added."
        )


class ExtraFeedForward(FeedForward):
    """A dense network on a branch of its own after a routed one (ST-MoE 2022)."""

    norm_scale: bool = Field(True, description="whether its norm has the parameters of others")

    def says(self, setting: Setting) -> Iterator[str]:
        """What follows."""
        network = f"{self.activation.kind}, {self.width:,} wide"
        yield f"After the routed branch follows a dense one of its own ({network})."


class Shared(Element):
    """Experts that every token meets."""

    shorthand = "count"

    count: int = Field(1, ge=1, le=10**6, description="how many, each as wide as `width`")
    width: int | None = Field(None, ge=1, le=10**7, description="hidden width; a routed expert's")
    gate: bool = Field(False, description="weigh their output by sigmoid(x w) (Qwen MoE)")

    def says(self, setting: Setting) -> Iterator[str]:
        """What is added."""
        width = self.width or setting.moe.expert_width
        gate = ", times a learned sigmoid gate of the token," if self.gate else ""
        one = self.count == 1
        outputs = "output" if one else "sum of the outputs"
        yield (
            f"Every token also meets {counted(self.count, 'shared expert')}"
            f"{'' if one else ', each'} {width:,} wide; the {outputs}{gate} is added."
        )


class SharedExperts(FeedForward):
    """All shared experts as one network: a sum of networks side by side is a wider one."""

    def describe(self, spec: Any) -> str:
        """`Shared experts: swiglu, 2048 wide together.`"""
        return f"Shared experts: {self.activation.kind}, {self.width} wide together."
