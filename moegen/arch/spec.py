"""The root of a spec file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

import moegen.arch.decoder
import moegen.arch.encoder_decoder
import moegen.arch.latent_attention
import moegen.arch.losses
import moegen.arch.mixture.model
import moegen.arch.multitask
import moegen.arch.recurrent
import moegen.arch.routing
import moegen.arch.two_tower
import moegen.arch.vision  # noqa: F401  (registers all parts)
from moegen.arch.init import Initialization
from moegen.arch.model import Model, RoutedLayer
from moegen.arch.parts import Part
from moegen.arch.phase import in_phase
from moegen.arch.precision import Precision
from moegen.arch.train import Train
from moegen.spec.element import Broken, Element, OneOf, Path
from moegen.spec.names import safe_name
from moegen.spec.words import listed, show

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
    without: tuple[Part, ...] = Field((), description="parts that their total leaves out")
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
    family: str | None = Field(None, description="models that it is told with, e.g. switch")
    year: int | None = Field(None, ge=1900, le=2100, description="when it was published")
    source: str | None = Field(None, description="paper, report or repository it is from")
    notes: str | None = Field(None, description="what a reader of the spec should know")
    published: Published | None = Field(None, description="the authors' own figures")
    model: Annotated[Model, OneOf(Model)] = Field(description="the network")
    precision: Precision = Field(Precision(), description="number formats by role")
    init: Initialization = Field(Initialization(), description="how parameters start")
    train: Train = Field(Train(), description="what a phase of training trains, and its rates")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What sections need of each other."""
        routed = self.model.routed()
        for path in dict.fromkeys(one.path for one in routed if one.moe.experts.recompute):
            if self.train.dropout.experts:
                sentence = "dropout keeps experts' products apart, so nothing is recomputed"
                yield (*path, "experts", "recompute"), f"{sentence}; drop one"
        if self.train.masking and any(one.moe.experts.residual for one in routed):
            sentence = "residual experts give the stream itself, which cannot be left out"
            yield ("train", "masking"), f"{sentence}; remove masking"
        if self.model.tied and "head" in (*self.train.freeze, *(self.train.only or ())):
            word = "freeze" if self.train.freeze else "only"
            yield ("train", word), "the head is the embedding's table (tied); say embedding"
        yield from self._unknown_losses(routed)

    def _unknown_losses(self, routed: list[RoutedLayer]) -> Iterator[tuple[Path, str]]:
        """Losses that are to be on in this phase and that no layer has."""
        known = dict.fromkeys(name for one in routed for name in one.moe.losses)
        on = self.train.losses
        for index, name in enumerate(on if isinstance(on, tuple) else ()):
            if name not in known:
                has = f"; known: {listed(known, 'and')}" if known else ""
                yield ("train", "losses", index), f"no routed layer has a loss {show(name)}{has}"

    @model_validator(mode="after")
    def _in_phase(self) -> Spec:
        """The model as it is in the phase that `train` describes."""
        self.__dict__["model"] = in_phase(self.model, self.train)
        return self

    def warnings(self) -> Iterator[tuple[Path, str]]:
        """Yield (path, sentence) for what is allowed but seldom meant."""
        for path, sentence in self.model.warnings():
            yield ("model", *path), sentence
        if self.precision.router in ("bf16", "fp16"):
            sentence = "a router in 16 bits chooses other experts than fp32 for up to 5% of tokens"
            yield ("precision", "router"), sentence
        yield from self._idle()

    def _idle(self) -> Iterator[tuple[Path, str]]:
        """What `train` says of routed layers that there are none of."""
        routed = self.model.routed()
        if self.train.masking and not routed:
            yield ("train", "masking"), "no layer is routed, so there is nothing to mask"
        if self.train.capacity and not any(one.moe.capacity for one in routed):
            yield ("train", "capacity"), "no layer has a capacity, so its factors say nothing"
