"""Rotary position embeddings: which dimensions turn, how fast, and in how long a context."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from moegen.graph.builder import Builder
from moegen.ops import rope as ops
from moegen.spec.element import Element, Kinds, OneOf, Path


class Scaling(Kinds):
    """How the frequencies are changed to reach contexts beyond the trained length."""

    factor: float = Field(1.0, ge=1, le=1e6, description="by how much the context grows")

    def frequencies(self, b: Builder, name: str, dim: int, theta: float, length: Any) -> Any:
        """Angles per position [dim / 2]; `length` is the sequence's length as a tensor []."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0


class Linear(Scaling):
    """Divide every frequency by the factor (position interpolation, Chen et al. 2023)."""

    kind: Literal["linear"] = "linear"

    def frequencies(self, b: Builder, name: str, dim: int, theta: float, length: Any) -> Any:
        """A constant."""
        facts: dict[str, Any] = {"dim": dim, "theta": theta, "factor": self.factor}
        return b.buffer(name, dim // 2, make=ops.rope_frequencies, **facts)


class Llama3(Scaling):
    """Interpolate long wavelengths only (Llama 3.1)."""

    kind: Literal["llama3"] = "llama3"
    original: int = Field(8192, ge=1, le=10**9, description="context that was trained")
    low: float = Field(1.0, gt=0, description="low_freq_factor")
    high: float = Field(4.0, gt=0, description="high_freq_factor")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """The band does not end before it begins."""
        if self.high < self.low:
            yield ("high",), f"high is {self.high} but must not be below low, {self.low}"

    def frequencies(self, b: Builder, name: str, dim: int, theta: float, length: Any) -> Any:
        """A constant."""
        facts: dict[str, Any] = {"dim": dim, "theta": theta, "factor": self.factor}
        facts |= {"original": self.original, "low": self.low, "high": self.high}
        return b.buffer(name, dim // 2, make=ops.llama3_frequencies, **facts)


class Yarn(Scaling):
    """YaRN (Peng et al. 2023), with DeepSeek's two magnitude factors."""

    kind: Literal["yarn"] = "yarn"
    original: int = Field(4096, ge=1, le=10**9, description="context that was trained")
    beta_fast: float = Field(32.0, gt=0, description="turns above which a dimension is kept")
    beta_slow: float = Field(1.0, gt=0, description="turns below which it is interpolated")
    truncate: bool = Field(True, description="round the band to whole dimensions")
    attention_factor: float | None = Field(None, gt=0, description="magnitude of cos and sin")
    mscale: float = Field(0.0, ge=0, description="DeepSeek: magnitude of cos and sin, numerator")
    mscale_all_dim: float = Field(
        0.0, ge=0, description="DeepSeek: its denominator, and (squared) of the softmax scale"
    )

    def frequencies(self, b: Builder, name: str, dim: int, theta: float, length: Any) -> Any:
        """A constant."""
        facts: dict[str, Any] = {
            "factor": self.factor,
            "original": self.original,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "truncate": self.truncate,
        }
        return b.buffer(name, dim // 2, make=ops.yarn_frequencies, dim=dim, theta=theta, **facts)

    def magnitude(self) -> float:
        """0.1 ln(factor) + 1, or the quotient of the two DeepSeek factors."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._grow(self.mscale) / self._grow(self.mscale_all_dim)
        return self._grow(1.0)

    def softmax_scale(self) -> float:
        """What DeepSeek's attention multiplies the softmax scale by."""
        return self._grow(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _grow(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


class Dynamic(Scaling):
    """NTK-aware scaling that depends on the sequence's length."""

    kind: Literal["dynamic"] = "dynamic"
    original: int = Field(4096, ge=1, le=10**9, description="context that was trained")

    def frequencies(self, b: Builder, name: str, dim: int, theta: float, length: Any) -> Any:
        """Computed in every pass, from the length."""
        return ops.dynamic_frequencies(length, dim, theta, self.factor, self.original)


class LongRope(Scaling):
    """LongRoPE (Ding et al. 2024): a factor for each dimension, one set for long sequences."""

    kind: Literal["longrope"] = "longrope"
    original: int = Field(4096, ge=1, le=10**9, description="context that was trained")
    short: tuple[float, ...] = Field(description="factors up to the trained context")
    long: tuple[float, ...] = Field(description="factors beyond it")
    attention_factor: float | None = Field(None, gt=0, description="magnitude of cos and sin")

    def frequencies(self, b: Builder, name: str, dim: int, theta: float, length: Any) -> Any:
        """Computed in every pass, from the length."""
        return ops.longrope_frequencies(length, dim, theta, self.original, self.short, self.long)

    def magnitude(self) -> float:
        """sqrt(1 + ln(factor) / ln(original))."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original))


class Rope(Element):
    """Rotary position embedding (Su et al. 2021)."""

    shorthand = "theta"

    theta: float = Field(10000.0, gt=0, le=1e12, description="base of the frequencies")
    dim: int | None = Field(None, ge=2, description="dimensions that turn; all of the head's")
    layout: Literal["half", "interleaved"] = Field(
        "half", description="pairs (i, i + r/2), or pairs (2i, 2i + 1)"
    )
    scaling: Annotated[Scaling | None, OneOf(Scaling, optional=True)] = Field(
        None, description="long-context scaling"
    )

    def rules(self) -> Iterator[tuple[Path, str]]:
        """Pairs need an even number of dimensions."""
        if self.dim is not None and self.dim % 2:
            yield ("dim",), f"rope turns pairs, so dim must be even, not {self.dim}"
        if isinstance(self.scaling, LongRope) and self.dim is not None:
            for name in ("short", "long"):
                given = len(getattr(self.scaling, name))
                if given != self.dim // 2:
                    sentence = f"{name} needs one factor a pair, {self.dim // 2}, not {given}"
                    yield ("scaling", name), sentence

    def tables(self, b: Builder, name: str, dim: int, positions: Any) -> tuple[Any, Any]:
        """cos and sin [S, dim / 2] at positions [S], in the compute dtype."""
        scaling = self.scaling or Linear()
        length = positions[-1] + 1
        frequencies = scaling.frequencies(b, name, dim, self.theta, length)
        angles = positions.unsqueeze(-1).float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        magnitude = scaling.magnitude()
        if magnitude != 1.0:
            cos, sin = cos * magnitude, sin * magnitude
        dtype = b.spec.precision.compute_dtype
        if dtype != torch.float32:
            cos, sin = cos.to(dtype), sin.to(dtype)
        return cos, sin

    def rotate(self, x: Any, cos: Any, sin: Any, width: int) -> Any:
        """Turn the first `dim` of x's last `width` dimensions."""
        turn = ops.rotate_half if self.layout == "half" else ops.rotate_pairs
        dim = self.dim or width
        if dim == width:
            return turn(x, cos, sin)
        turned = turn(x[..., :dim], cos, sin)
        return torch.cat((turned, x[..., dim:]), -1)
