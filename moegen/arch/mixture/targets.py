"""Targets: what a mixture on vectors is to predict, as a density of it given an output."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from moegen.errors import MoegenError, Problem
from moegen.graph.builder import Builder
from moegen.ops.mixtures import (
    bernoulli_log_density,
    class_log_density,
    gaussian_log_density,
)
from moegen.spec.element import Kinds


def no_length(asked: int | None) -> int:
    """One place an example; a MoegenError if a sequence is asked for."""
    if asked is not None:
        hint = "leave out the sequence; --batch says how many examples there are"
        sentence = "an example of this kind of model is a row, which has no length"
        raise MoegenError(Problem(sentence, hint=hint))
    return 1


class Target(Kinds):
    """What is known of an example in training, and how likely it is given an output."""

    default_kind: ClassVar[str | None] = "values"
    noun: ClassVar[str] = ""

    @property
    def size(self) -> int:
        """Numbers of an output."""
        return 1

    def example(self, batch: Any) -> Any:
        """Targets of a batch."""
        return torch.zeros(batch)

    def log_density(self, b: Builder, outputs: Any, target: Any) -> Any:
        """ln P(target) but for a constant: outputs [B, E, n] -> [B, E]."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def error(self, b: Builder, outputs: Any, target: Any) -> Any:
        """What is small where an output is right: outputs [B, E, n] -> [B, E]."""
        return -self.log_density(b, outputs, target)

    def constant(self) -> float:
        """What `log_density` leaves out."""
        return 0.0

    def prediction(self, outputs: Any) -> Any:
        """What an output says: its mean, or probabilities."""
        return outputs


class Values(Target):
    """Numbers with Gaussian noise of a known variance around an expert's output."""

    shorthand = "outputs"

    kind: Literal["values"] = "values"
    noun: ClassVar[str] = "values"
    outputs: int = Field(1, ge=1, le=10**6, description="numbers to predict", examples=[1])
    variance: float = Field(1.0, gt=0, le=1e12, description="of the noise, the same for all")

    @property
    def size(self) -> int:
        """As many as there are to predict."""
        return self.outputs

    def example(self, batch: Any) -> Any:
        """Numbers [B, n]."""
        return torch.zeros(batch, self.outputs)

    def log_density(self, b: Builder, outputs: Any, target: Any) -> Any:
        """Of a Gaussian."""
        return gaussian_log_density(outputs, target, self.variance)

    def error(self, b: Builder, outputs: Any, target: Any) -> Any:
        """The squared distance, whatever the variance."""
        return gaussian_log_density(outputs, target, 0.5) * -1

    def constant(self) -> float:
        """Of the Gaussian's norm."""
        return -0.5 * self.outputs * math.log(2 * math.pi * self.variance)


class Binary(Target):
    """Yes or no: 1 and 0, or 1 and -1; an expert's output is a logit."""

    kind: Literal["binary"] = "binary"
    noun: ClassVar[str] = "yes or no"

    def log_density(self, b: Builder, outputs: Any, target: Any) -> Any:
        """Of a Bernoulli distribution, so its error is the logistic loss."""
        return bernoulli_log_density(outputs, target)

    def prediction(self, outputs: Any) -> Any:
        """The probability of yes."""
        return outputs.sigmoid()


class Classes(Target):
    """One of several classes; an expert's outputs are logits."""

    shorthand = "count"

    kind: Literal["classes"] = "classes"
    noun: ClassVar[str] = "classes"
    count: int = Field(ge=2, le=10**6, description="how many there are", examples=[10])

    @property
    def size(self) -> int:
        """A logit a class."""
        return self.count

    def example(self, batch: Any) -> Any:
        """Numbers of classes [B]."""
        return torch.zeros((batch,), dtype=torch.int64)

    def log_density(self, b: Builder, outputs: Any, target: Any) -> Any:
        """Of a softmax."""
        return class_log_density(outputs, target)

    def prediction(self, outputs: Any) -> Any:
        """Probabilities of classes."""
        return outputs.softmax(-1)
