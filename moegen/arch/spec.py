"""The root of a spec file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

import moegen.arch.decoder
import moegen.arch.latent_attention
import moegen.arch.losses
import moegen.arch.routing  # noqa: F401  (registers all parts)
from moegen.arch.init import Initialization
from moegen.arch.model import Model
from moegen.arch.precision import Precision
from moegen.spec.element import Broken, Element, OneOf, Path
from moegen.spec.names import safe_name


class Dropout(Element):
    """Rates of dropout, dense branches and experts apart (Switch Transformer section 2.4)."""

    dense: float = Field(0.0, ge=0, lt=1, description="on the output of every branch")
    experts: float = Field(0.0, ge=0, lt=1, description="inside the routed experts")


class Train(Element):
    """What holds in training only."""

    dropout: Dropout = Field(Dropout(), description="rates of dropout")


UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _number(value: object) -> object:
    """46.7B as 46700000000."""
    if isinstance(value, str) and value[-1:].upper() in UNITS:
        try:
            return round(float(value[:-1]) * UNITS[value[-1].upper()])
        except (ValueError, OverflowError):
            return value
    return value


Count = Annotated[int, BeforeValidator(_number), Field(ge=0, le=10**16)]


class Published(Element):
    """What the authors print, to be held against what is counted."""

    total: Count | None = Field(None, description="parameters in all, e.g. 46.7B")
    active: Count | None = Field(None, description="parameters a token uses, e.g. 12.9B")
    note: str | None = Field(None, description="why a figure differs, if it does")


def _folder(name: str) -> str:
    """A name, if a folder may be called that."""
    problem = safe_name(name)
    if problem:
        raise Broken([((), problem)])
    return name


class Spec(Element):
    """An architecture, its number formats, and what is known of it."""

    name: Annotated[str, AfterValidator(_folder)] = Field(
        description="name of the architecture and of the emitted package"
    )
    source: str | None = Field(None, description="paper, report or repository it is from")
    notes: str | None = Field(None, description="what a reader of the spec should know")
    published: Published | None = Field(None, description="the authors' own figures")
    model: Annotated[Model, OneOf(Model)] = Field(description="the network")
    precision: Precision = Field(Precision(), description="number formats by role")
    init: Initialization = Field(Initialization(), description="how parameters start")
    train: Train = Field(Train(), description="what holds in training only")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What sections need of each other."""
        experts = getattr(getattr(self.model, "moe", None), "experts", None)
        if experts is not None and experts.recompute and self.train.dropout.experts:
            path = ("model", "moe", "experts", "recompute")
            sentence = "dropout keeps experts' products apart, so nothing is recomputed; drop one"
            yield path, sentence

    def warnings(self) -> Iterator[tuple[Path, str]]:
        """Yield (path, sentence) for what is allowed but seldom meant."""
        for path, sentence in self.model.warnings():
            yield ("model", *path), sentence
        if self.precision.router in ("bf16", "fp16"):
            sentence = "a router in 16 bits chooses other experts than fp32 for up to 5% of tokens"
            yield ("precision", "router"), sentence
