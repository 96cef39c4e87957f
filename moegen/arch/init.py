"""Initialisation: from which distribution parameters start."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

import moegen.ops.start  # noqa: F401  (registers orthogonal_)
from moegen.graph.component import Init
from moegen.spec.element import Element, Path
from moegen.spec.words import listed

Kind = Literal["normal", "truncated", "lecun", "uniform", "xavier", "orthogonal", "zeros"]

# The settings of each kind, and what they are where no rule says them.
SETTINGS: dict[str, tuple[str, ...]] = {
    "normal": ("std", "factor"),
    "truncated": ("scale", "corrected", "factor"),
    "lecun": ("scale", "factor"),
    "uniform": ("scale", "factor"),
    "xavier": ("gain", "factor"),
    "orthogonal": ("gain", "factor"),
    "zeros": (),
}
DEFAULTS = {"std": 0.02, "scale": 1.0, "corrected": False, "gain": 1.0, "factor": 1.0}

# Standard deviation of N(0, 1) cut at two: `variance_scaling` of JAX divides by it.
CUT = 0.87962566103423978


class Start(Element):
    """How the weight matrices of a part start. Without a `kind`, as the whole model's otherwise.

    fan_in and fan_out are a matrix's columns and rows; each expert's gate, up and down count as
    matrices of their own.
    """

    shorthand = "kind"

    kind: Kind | None = Field(
        None,
        description="N(0, std^2); N(0, scale / fan_in), cut at two sigma (truncated) or not "
        "(lecun); uniform up to sqrt(scale / fan_in), as torch's own layers (uniform), or up to "
        "gain * sqrt(6 / (fan_in + fan_out)) (xavier); orthogonal rows or columns of length gain; "
        "zeros",
    )
    std: float | None = Field(None, gt=0, le=10, description="of kind normal; 0.02 unless said")
    scale: float | None = Field(
        None,
        gt=0,
        le=100,
        description="s of sqrt(s / fan_in), kinds truncated, lecun and uniform; else 1",
    )
    corrected: bool | None = Field(
        None,
        description="of kind truncated: whether sqrt(s / fan_in) is the deviation after the cut, "
        "as in JAX's variance_scaling, or before it",
    )
    gain: float | None = Field(
        None, gt=0, le=100, description="of kinds xavier and orthogonal; 1 unless said"
    )
    factor: float | None = Field(
        None, gt=0, le=1000, description="multiplies what any kind draws; 1 unless said"
    )


class ExpertStart(Start):
    """How the routed experts' matrices start."""

    identical: bool = Field(
        False, description="whether all experts of a layer start from the same matrices (V-MoE)"
    )
    last: Start | None = Field(
        None, description="for each expert's last matrix; zeros: it adds nothing at first (BASE)"
    )


class Initialization(Start):
    """How weight matrices start; norms start at one and biases at zero.

    What is said for a part overrides what is said for all: with a `kind`, all of it; without one,
    only what it names.
    """

    kind: Kind = Field("normal", description=Start.model_fields["kind"].description)
    embedding: Start | None = Field(None, description="for embeddings, and a tied head")
    head: Start | None = Field(None, description="for the head")
    attention: Start | None = Field(None, description="for attention")
    dense: Start | None = Field(None, description="for dense feed-forward networks")
    shared: Start | None = Field(None, description="for shared experts")
    experts: ExpertStart | None = Field(None, description="for routed experts")
    router: Start | None = Field(None, description="for routers")
    noise: Start | None = Field(None, description="for learned noise; the router's unless said")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """Settings of the kind that they are to be used with."""
        parts: dict[Path, Start | None] = {(name,): getattr(self, name) for name in _PARTS}
        last = self.experts.last if self.experts else None
        for path, rule in {(): self, **parts, ("experts", "last"): last}.items():
            kind = str(self._rules(path)[-1].kind)
            for name in DEFAULTS:
                if getattr(rule, name, None) is not None and name not in SETTINGS[kind]:
                    kinds = listed((k for k, said in SETTINGS.items() if name in said), "and")
                    yield (*path, name), f"{name} is for {kinds}, not for {kind}"

    def of(self, shape: tuple[int, ...], role: str, name: str = "") -> Init:
        """How a weight of this shape, role and name starts."""
        rules = self._rules(_path(role, name))
        said: dict[str, Any] = {
            key: next((v for r in rules if (v := getattr(r, key)) is not None), default)
            for key, default in DEFAULTS.items()
        }
        parts = 2 if name.startswith("gate_up") else 1
        start = _drawn(str(rules[-1].kind), shape, parts, **said)
        same = role == "routed_experts" and self.experts is not None and self.experts.identical
        return replace(start, identical=True) if same and start != ZEROS else start

    def _rules(self, path: Path) -> list[Start]:
        """The rules that have a say at a path, nearest first, up to one that names a kind."""
        experts = self.experts or ExpertStart()
        nearest: dict[Path, list[Start | None]] = {
            (): [],
            ("noise",): [self.noise, self.router],
            ("experts", "last"): [experts.last, experts],
        }
        found: list[Start] = []
        for rule in nearest.get(path) or [getattr(self, str(name)) for name in path]:
            found += [rule] if rule else []
            if rule and rule.kind:
                return found
        return [*found, self]


def normal(std: float) -> Init:
    """N(0, std^2)."""
    return Init("normal_", (("std", std),)) if std else ZEROS


def _drawn(
    kind: str,
    shape: tuple[int, ...],
    parts: int,
    *,
    std: float,
    scale: float,
    corrected: bool,
    gain: float,
    factor: float,
) -> Init:
    """The call that draws a weight; parts: matrices that stand one below the other in it."""
    fan_in, fan_out = shape[-1], (1, *shape)[-2] // parts
    sigma = math.sqrt(scale / fan_in) * factor
    if kind == "normal":
        return normal(std * factor)
    if kind == "lecun":
        return normal(sigma)
    if kind == "truncated":
        sigma = sigma / CUT if corrected else sigma
        return Init("trunc_normal_", (("std", sigma), ("a", -2 * sigma), ("b", 2 * sigma)))
    if kind == "uniform":
        return Init("uniform_", (("a", -sigma), ("b", sigma)))
    if kind == "xavier":
        bound = gain * factor * math.sqrt(6 / (fan_in + fan_out))
        return Init("uniform_", (("a", -bound), ("b", bound)))
    if kind == "orthogonal":
        said = (("gain", gain * factor, 1.0), ("parts", parts, 1))
        return Init("orthogonal_", tuple((k, v) for k, v, usual in said if v != usual))
    return ZEROS


def _path(role: str, name: str) -> Path:
    """Where `init` says how a weight of this role and name starts."""
    part = {"routed_experts": "experts", "shared_experts": "shared"}.get(role, role)
    words = name.split("_")
    if part == "router" and "noise" in words:
        return ("noise",)
    if part == "router" and "embedding" in words:
        return ("embedding",)
    if part == "experts" and "down" in words:
        return ("experts", "last")
    return (part,) if part in _PARTS else ()


_PARTS = ("embedding", "head", "attention", "dense", "shared", "experts", "router", "noise")

ONES = Init("ones_")
ZEROS = Init("zeros_")
