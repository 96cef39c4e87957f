"""Scores: how well a token and an expert fit, as logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.init import ZEROS, normal
from moegen.arch.routing.ids import TOKEN, named
from moegen.arch.routing.routed import Site
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.graph.component import Init
from moegen.ops.scores import distances, table_logits, unit
from moegen.ops.tables import balanced_zipf_table, random_table
from moegen.spec.element import Kinds, Path
from moegen.spec.words import counted, listed


class Score(Kinds):
    """Logits of every expert for every token."""

    default_kind: ClassVar[str | None] = "linear"
    learned: ClassVar[bool] = True
    per_site: ClassVar[bool] = False  # whether there can be one for each task or expert

    def ids(self) -> tuple[str, ...]:
        """Names of the ids that it reads."""
        return ()

    def logits(self, b: Builder, tokens: Any, site: Site) -> Any:
        """tokens [T, d] to logits [T, E], in the router's precision."""
        raise TypeError(f"{type(self).__name__} computes nothing")


class LinearScore(Score):
    """x W, with or without a bias (Shazeer et al. 2017)."""

    kind: Literal["linear"] = "linear"
    per_site: ClassVar[bool] = True
    bias: bool = Field(False, description="whether the logits have a learned bias")
    cap: float | None = Field(None, gt=0, description="bound of the logits: cap * tanh(l / cap)")

    def says(self, setting: Setting) -> Iterator[str]:
        """Which matrix, and what is done to its logits."""
        of, gates = "", setting.router.gates
        if setting.inside:
            of = " of the row's expert"
        elif gates:
            of = f" of the token's {named(gates.id)}, one of {gates.count:,},"
        what = "matrix and a bias" if self.bias else "matrix"
        precision = setting.spec.precision.router
        verb = "give" if self.bias else "gives"
        yield f"A learned {what}{of} {verb} each of {setting.logits} a logit, in {precision}."
        if self.cap:
            yield f"Logits l are bounded: {self.cap:g} tanh(l / {self.cap:g})."

    def logits(self, b: Builder, tokens: Any, site: Site) -> Any:
        """A matrix of one row an expert."""
        logits = site.linear(b, tokens, "router", site.choices, self.bias)
        if self.cap:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits


class CosineScore(Score):
    """The cosine of a token and an expert's vector, over a temperature.

    With a projection to `dim`: X-MoE (Chi et al. 2022), where scores are divided by a learned
    temperature, and GMoE/Tutel (Li et al. 2023), where they are multiplied by the exponential of a
    learned one. Without: Soft MoE's normalised logits, where `temperature: scale` is a learned
    factor.
    """

    kind: Literal["cosine"] = "cosine"
    dim: int | None = Field(None, ge=1, le=10**6, description="width tokens are projected to")
    bias: bool = Field(False, description="whether the projection has a bias")
    normalize: Literal["both", "experts"] = Field(
        "both", description="what is brought to length one; experts alone as in torchscale"
    )
    temperature: Literal["none", "divide", "exp", "scale"] = Field(
        "divide", description="a learned t: scores / t, scores * min(e^t, 100), scores * t, or none"
    )
    start: float = Field(0.07, gt=0, le=1e4, description="t at the start; for exp, e^-t")
    eps: float = Field(0.0, ge=0, lt=1, description="added to squared lengths")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """A bias belongs to a projection."""
        if self.bias and self.dim is None:
            yield ("bias",), "bias is that of the projection; give dim too"
        if self.temperature == "none" and "start" in self.model_fields_set:
            yield ("start",), "start is where the temperature starts, and there is none"

    def says(self, setting: Setting) -> Iterator[str]:
        """What is compared, and how it is sharpened."""
        precision, vector = setting.spec.precision.router, "the token's vector"
        if self.dim:
            bias = ", with a bias" if self.bias else ""
            yield f"A learned matrix projects the input to {counted(self.dim, 'number')}{bias}."
            vector = "the projection"
        compared = f"the cosine of {vector} and its own learned vector"
        if self.normalize == "experts":
            compared = f"the product of {vector} and its own learned vector of length one"
        yield f"The logit of each of {setting.logits} is {compared}, in {precision}."
        t = f"number that starts at {self.start:g}"
        if self.temperature == "exp":
            t = f"factor that starts at {1 / self.start:.4g} and is at most 100"
        verb = "divided" if self.temperature == "divide" else "multiplied"
        if self.temperature != "none":
            yield f"Logits are {verb} by a learned {t}."

    def logits(self, b: Builder, tokens: Any, site: Site) -> Any:
        """Cosines, sharpened."""
        dtype = b.spec.precision.router_dtype
        width = b.width
        seen = tokens.to(dtype) if dtype != b.spec.precision.compute_dtype else tokens
        facts: dict[str, Any] = {"dtype": dtype, "role": "router"}
        if self.dim:
            weight = b.param("projection", self.dim, width, init=_default(width), **facts)
            bias = b.param("projection_bias", self.dim, init=ZEROS, **facts) if self.bias else None
            seen = F.linear(seen, weight, bias)
        experts = unit(b.param("router", site.choices, self.dim or width, **facts), self.eps)
        if self.normalize == "both":
            seen = unit(seen, self.eps)
        logits = F.linear(seen, experts)
        if self.temperature == "none":
            return logits
        begin = -math.log(self.start) if self.temperature == "exp" else self.start
        t = b.param("temperature", 1, init=Init("constant_", (("val", begin),)), **facts)
        if self.temperature == "divide":
            return logits / t
        if self.temperature == "exp":
            t = t.clamp(max=math.log(100)).exp()
        return logits * t


class _DensityScore(Score):
    """The posterior of a mixture of densities over the input, one an expert."""

    learned_scale: bool = Field(True, description="whether each expert's scale is learned")
    priors: bool = Field(True, description="whether each expert's prior weight is learned")

    def says(self, setting: Setting) -> Iterator[str]:
        """Which densities, and what of them is learned."""
        learned = ["mean"]
        learned += ["scale"] if self.learned_scale else []
        learned += ["prior"] if self.priors else []
        precision, density = setting.spec.precision.router, self.kind.capitalize()
        yield (
            f"The logit of each of {setting.logits} is the logarithm of its {density} density at "
            f"the token, in {precision}; each has a learned {listed(learned, 'and')}."
        )

    def logits(self, b: Builder, tokens: Any, site: Site) -> Any:
        """Logarithms of joint densities, without what is the same for all experts."""
        dtype, width = b.spec.precision.router_dtype, b.width
        facts: dict[str, Any] = {"dtype": dtype, "role": "router"}
        seen = tokens.to(dtype) if dtype != b.spec.precision.compute_dtype else tokens
        means = b.param("router", site.choices, width, **facts)
        log_scale = None
        if self.learned_scale:
            log_scale = b.param("log_scale", site.choices, init=ZEROS, **facts)
        logits = self._densities(seen, means, log_scale)
        if self.priors:
            logits = logits + b.param("log_prior", site.choices, init=ZEROS, **facts)
        return logits

    def _densities(self, seen: Any, means: Any, log_scale: Any) -> Any:
        raise TypeError(f"{type(self).__name__} computes nothing")


class GaussianScore(_DensityScore):
    """ln a - d ln s - |x - m|^2 / (2 s^2) (Xu, Jordan and Hinton 1994)."""

    kind: Literal["gaussian"] = "gaussian"

    def _densities(self, seen: Any, means: Any, log_scale: Any) -> Any:
        squared = distances(seen, means, squared=True)
        if log_scale is None:
            return squared * -0.5
        return squared * (log_scale * -2).exp() * -0.5 - log_scale * seen.shape[-1]


class LaplaceScore(_DensityScore):
    """ln a - |x - m| / s, a sharper peak around each mean."""

    kind: Literal["laplace"] = "laplace"

    def _densities(self, seen: Any, means: Any, log_scale: Any) -> Any:
        far = distances(seen, means, squared=False)
        return -far if log_scale is None else -far * (-log_scale).exp()


class TableScore(Score):
    """The expert of a token is looked up by its id and never learned (Hash Layers, 2021).

    The table is a buffer of the model, `expert_of_id`: fill it from your own counts to balance it
    better than an assumed law of frequencies can.
    """

    shorthand = "by"

    kind: Literal["table"] = "table"
    learned: ClassVar[bool] = False
    by: Literal["random", "balanced"] = Field(
        "random", description="any expert for each id, or even load under Zipf's law of ids"
    )
    seed: int = Field(42, ge=0, lt=2**31, description="of random tables")

    def says(self, setting: Setting) -> Iterator[str]:
        """How the table is made."""
        ids = counted(setting.spec.model.vocab_size, "token id")
        made = {
            "random": f"drawn with seed {self.seed}",
            "balanced": "so that loads are even if ids follow Zipf's law",
        }[self.by]
        yield f"A fixed table names one of {setting.experts} for each of {ids}, {made}."
        yield "It is not learned."

    def ids(self) -> tuple[str, ...]:
        """The model's own input."""
        return (TOKEN,)

    def logits(self, b: Builder, tokens: Any, site: Site) -> Any:
        """0 for the expert of the token's id, minus infinity for all others."""
        size = b.spec.model.vocab_size
        facts: dict[str, Any] = {"dtype": torch.int64, "persistent": True}
        facts |= {"ids": size, "experts": site.choices}
        if self.by == "random":
            table = b.buffer("expert_of_id", size, make=random_table, seed=self.seed, **facts)
        else:
            table = b.buffer("expert_of_id", size, make=balanced_zipf_table, **facts)
        return table_logits(table[site.ids[TOKEN]], site.choices, b.spec.precision.router_dtype)


def _default(fan_in: int) -> Init:
    """As torch starts a linear layer's matrix, whose rows then hardly change a length."""
    return normal(1 / math.sqrt(fan_in))
