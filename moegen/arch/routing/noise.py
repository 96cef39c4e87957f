"""Noise: what a router adds in training so that experts are explored; evaluation has none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field

from moegen.arch.routing.routed import Site
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.noise import gaussian_noise, gumbel_noise, jitter, uniform_noise
from moegen.spec.element import Kinds, Path


class Noise(Kinds):
    """Randomness at two points of a router: on its input, and on its logits.

    selection_only: the gates are those of the logits without it.
    """

    default_kind: ClassVar[str | None] = "jitter"
    per_site: ClassVar[bool] = True  # whether there can be one for each task or expert
    selection_only: bool = Field(False, description="gates see the logits without the noise")

    def on_input(self, b: Builder, tokens: Any) -> Any:
        """tokens [T, d] as the router sees them; the experts see them as they are."""
        return tokens

    def on_logits(self, b: Builder, logits: Any, seen: Any, site: Site) -> tuple[Any, Any]:
        """logits [T, E] of what was seen [T, d], noisy; and the deviation of normal noise."""
        return logits, None

    def _added(self, what: str) -> str:
        """The sentence of noise on logits, and for whom it is there."""
        seen = "for selection alone" if self.selection_only else "for selection and weights"
        return f"In training only, {what} is added to the logits, {seen}."


class _InputNoise(Noise):
    """Noise on the input reaches the gates, so the field that says otherwise has no use."""

    def rules(self) -> Iterator[tuple[Path, str]]:
        """Gates see what the router sees."""
        if self.selection_only:
            yield ("selection_only",), f"{self.kind} is on the router's input, which gates see too"


class Jitter(_InputNoise):
    """Multiply the router's input by U(1 - eps, 1 + eps) (Switch Transformer section 2.4)."""

    shorthand = "eps"

    kind: Literal["jitter"] = "jitter"
    eps: float = Field(0.01, gt=0, lt=1, description="half width of the uniform factor")

    def says(self, setting: Setting) -> Iterator[str]:
        """How wide."""
        factor = f"random factor from {1 - self.eps:g} to {1 + self.eps:g}"
        yield f"In training only, each number that the router sees is multiplied by a {factor}."

    def on_input(self, b: Builder, tokens: Any) -> Any:
        """Jittered in training."""
        return jitter(tokens, self.eps, b.training)


class InputDropout(_InputNoise):
    """Dropout on the router's input alone (an option of Switch Transformer section 2.4)."""

    shorthand = "rate"

    kind: Literal["dropout"] = "dropout"
    rate: float = Field(0.1, gt=0, lt=1, description="share of the input's numbers left out")

    def says(self, setting: Setting) -> Iterator[str]:
        """How much."""
        yield f"In training only, dropout of {self.rate:g} is on what the router sees."

    def on_input(self, b: Builder, tokens: Any) -> Any:
        """Dropped out in training."""
        return F.dropout(tokens, self.rate, b.training)


class GaussianNoise(Noise):
    """N(0, std^2) on the logits, by default with std 1 / E (V-MoE 2021, GMoE 2023)."""

    shorthand = "std"

    kind: Literal["gaussian"] = "gaussian"
    std: float | Literal["1/E"] = Field("1/E", description="standard deviation")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """A deviation is positive."""
        if not isinstance(self.std, str) and not 0 < self.std <= 1e4:
            yield ("std",), f"std is {self.std:g} but must be above 0 and at most 10000"

    def says(self, setting: Setting) -> Iterator[str]:
        """Of which deviation."""
        std = self.deviation(setting.router.select.logits(setting.choices))
        yield self._added(f"Gaussian noise of standard deviation {std:.4g}")

    def deviation(self, choices: int) -> float:
        """The standard deviation, a number."""
        return 1 / choices if isinstance(self.std, str) else self.std

    def on_logits(self, b: Builder, logits: Any, seen: Any, site: Site) -> tuple[Any, Any]:
        """Of one deviation for all experts."""
        std = self.deviation(site.choices)
        return gaussian_noise(logits, std, b.training), std


class LearnedNoise(Noise):
    """N(0, s^2) on the logits with s = softplus(x W_noise), learned (Shazeer et al. 2017)."""

    kind: Literal["learned"] = "learned"
    floor: float = Field(0.01, ge=0, le=10, description="added to s; the paper has 0")

    def says(self, setting: Setting) -> Iterator[str]:
        """Of which deviation."""
        floor = f", at least {self.floor:g}" if self.floor else ""
        yield self._added(f"Gaussian noise of a learned standard deviation, softplus(x W){floor},")

    def on_logits(self, b: Builder, logits: Any, seen: Any, site: Site) -> tuple[Any, Any]:
        """A matrix of its own, from zeros, gives every deviation."""
        deviation = F.softplus(site.linear(b, seen, "noise", site.choices))
        if self.floor:
            deviation = deviation + self.floor
        return gaussian_noise(logits, deviation, b.training), deviation


class UniformNoise(Noise):
    """U(low, high) on the logits: Chen et al. 2022 (selection only), FastMoE (1 - eps, 1 + eps)."""

    kind: Literal["uniform"] = "uniform"
    low: float = Field(0.0, ge=-1e4, le=1e4, description="lower end")
    high: float = Field(1.0, ge=-1e4, le=1e4, description="upper end")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """An interval."""
        if self.low >= self.high:
            yield ("high",), f"high is {self.high:g} but must be above low, {self.low:g}"

    def says(self, setting: Setting) -> Iterator[str]:
        """How wide."""
        yield self._added(f"uniform noise from {self.low:g} to {self.high:g}")

    def on_logits(self, b: Builder, logits: Any, seen: Any, site: Site) -> tuple[Any, Any]:
        """Independent for every token and expert."""
        return uniform_noise(logits, self.low, self.high, b.training), None


class GumbelNoise(Noise):
    """Gumbel noise for selection: experts are drawn with the probabilities of the softmax."""

    kind: Literal["gumbel"] = "gumbel"
    selection_only: bool = Field(True, description="gates see the logits without the noise")

    def says(self, setting: Setting) -> Iterator[str]:
        """What follows from it."""
        yield self._added("Gumbel noise")

    def on_logits(self, b: Builder, logits: Any, seen: Any, site: Site) -> tuple[Any, Any]:
        """The best of logits + Gumbel noise is a sample."""
        return gumbel_noise(logits, b.training), None
