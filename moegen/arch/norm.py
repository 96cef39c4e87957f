"""Normalisation layers, and where they stand in a block."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field

from moegen.arch.init import ONES, ZEROS
from moegen.graph.builder import Builder
from moegen.spec.element import Kinds

NormPlacement = Literal["pre", "post", "output", "sandwich"]


class Norm(Kinds):
    """A normalisation over the last dimension."""

    default_kind: ClassVar[str | None] = "rms"

    eps: float = Field(1e-6, gt=0, le=1, description="added to the variance")
    scale: bool = Field(True, description="whether there is a learned scale")
    placement: NormPlacement = Field(
        "pre",
        description="pre: on a branch's input; output: on its output; sandwich: on both; "
        "post: after the residual sum",
    )

    def apply(self, b: Builder, name: str, x: Any, width: int) -> Any:
        """Normalise x [..., width] with parameters called `name`."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def plain(self) -> Norm:
        """This norm without parameters."""
        off = {name: False for name in ("scale", "bias") if hasattr(self, name)}
        return self.model_copy(update=off)

    def _scale(self, b: Builder, name: str, width: int) -> Any:
        return b.param(name, width, init=ONES, role="norms") if self.scale else None


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang & Sennrich 2019)."""

    kind: Literal["rms"] = "rms"

    def apply(self, b: Builder, name: str, x: Any, width: int) -> Any:
        """Normalise x [..., width] with a parameter called `name`."""
        scale = self._scale(b, name, width)
        return F.rms_norm(x, (width,), scale, self.eps)


class LayerNorm(Norm):
    """(x - mean) / sqrt(var + eps) * scale + bias (Ba et al. 2016)."""

    kind: Literal["layer"] = "layer"
    bias: bool = Field(True, description="whether there is a bias")

    def apply(self, b: Builder, name: str, x: Any, width: int) -> Any:
        """Normalise x [..., width] with parameters called `name` and `name`_bias."""
        scale = self._scale(b, name, width)
        bias = b.param(f"{name}_bias", width, init=ZEROS, role="norms") if self.bias else None
        return F.layer_norm(x, (width,), scale, bias, self.eps)
