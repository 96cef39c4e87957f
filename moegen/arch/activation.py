"""Activations of feed-forward networks and experts, gated and plain."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field

from moegen.ops.activations import clamped_swiglu, cubic, geglu, reglu, relu2, swiglu
from moegen.spec.element import Kinds


class Activation(Kinds):
    """What stands between the projections of a feed-forward network.

    A gated one takes two projections of the input, a plain one takes one.
    """

    default_kind: ClassVar[str | None] = "swiglu"
    gated: ClassVar[bool] = True

    def apply(self, gate: Any, up: Any = None) -> Any:
        """The hidden values, from the gate's projection and, if gated, the other one."""
        raise TypeError(f"{type(self).__name__} computes nothing")


class SwiGLU(Activation):
    """silu(gate) * up (Shazeer 2020)."""

    kind: Literal["swiglu"] = "swiglu"

    def apply(self, gate: Any, up: Any = None) -> Any:
        """silu(gate) * up."""
        return swiglu(gate, up)


class GeGLU(Activation):
    """gelu(gate) * up (Shazeer 2020), exact or by tanh."""

    kind: Literal["geglu"] = "geglu"
    approximate: Literal["none", "tanh"] = Field("none", description="form of the GELU")

    def apply(self, gate: Any, up: Any = None) -> Any:
        """gelu(gate) * up."""
        return geglu(gate, up, approximate=self.approximate)


class ReGLU(Activation):
    """relu(gate) * up (Shazeer 2020)."""

    kind: Literal["reglu"] = "reglu"

    def apply(self, gate: Any, up: Any = None) -> Any:
        """relu(gate) * up."""
        return reglu(gate, up)


class ClampedSwiGLU(Activation):
    """gpt-oss: (clip(up, -l, l) + 1) * g * sigmoid(alpha * g) with g = min(gate, l)."""

    kind: Literal["clamped_swiglu"] = "clamped_swiglu"
    limit: float = Field(7.0, gt=0, description="bound of both projections")
    alpha: float = Field(1.702, gt=0, description="steepness of the sigmoid")

    def apply(self, gate: Any, up: Any = None) -> Any:
        """(clip(up, -l, l) + 1) * g * sigmoid(alpha * g)."""
        return clamped_swiglu(gate, up, limit=self.limit, alpha=self.alpha)


class ReLU(Activation):
    """max(x, 0)."""

    kind: Literal["relu"] = "relu"
    gated: ClassVar[bool] = False

    def apply(self, gate: Any, up: Any = None) -> Any:
        """max(x, 0)."""
        return F.relu(gate)


class SquaredReLU(Activation):
    """max(x, 0)^2 (So et al. 2021)."""

    kind: Literal["relu2"] = "relu2"
    gated: ClassVar[bool] = False

    def apply(self, gate: Any, up: Any = None) -> Any:
        """max(x, 0)^2."""
        return relu2(gate)


class GELU(Activation):
    """x * Phi(x) (Hendrycks & Gimpel 2016), exact or by tanh."""

    kind: Literal["gelu"] = "gelu"
    gated: ClassVar[bool] = False
    approximate: Literal["none", "tanh"] = Field("none", description="form of the GELU")

    def apply(self, gate: Any, up: Any = None) -> Any:
        """x * Phi(x)."""
        return F.gelu(gate, approximate=self.approximate)


class SiLU(Activation):
    """x * sigmoid(x)."""

    kind: Literal["silu"] = "silu"
    gated: ClassVar[bool] = False

    def apply(self, gate: Any, up: Any = None) -> Any:
        """x * sigmoid(x)."""
        return F.silu(gate)


class Cubic(Activation):
    """x^3 (Chen et al. 2022), whose experts specialise where linear ones do not."""

    kind: Literal["cubic"] = "cubic"
    gated: ClassVar[bool] = False

    def apply(self, gate: Any, up: Any = None) -> Any:
        """x^3."""
        return cubic(gate)


class Identity(Activation):
    """x itself: linear experts, as those of hierarchical mixtures (Jordan and Jacobs 1994)."""

    kind: Literal["linear"] = "linear"
    gated: ClassVar[bool] = False

    def apply(self, gate: Any, up: Any = None) -> Any:
        """The value itself."""
        return gate
