"""Experts of a mixture on vectors: networks of one shape, as stacked matrices."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.activation import Activation, ReLU
from moegen.arch.init import ZEROS
from moegen.graph.builder import Builder
from moegen.ops.experts import grouped_bias, grouped_linear
from moegen.ops.mixtures import fixed_signs
from moegen.spec.element import Element, OneOf, Path
from moegen.spec.words import counted, listed

Width = Annotated[int, Field(ge=1, le=10**7)]


class VectorExperts(Element):
    """Experts of one shape: linear ones, or networks with hidden layers."""

    shorthand = "count"

    count: int = Field(ge=1, le=10**6, description="how many experts", examples=[4])
    hidden: tuple[Width, ...] = Field(
        (), description="widths of an expert's hidden layers; none: it is linear", examples=[[16]]
    )
    activation: Annotated[Activation, OneOf(Activation)] = Field(
        ReLU(), description="activation of hidden layers, e.g. relu, cubic, linear"
    )
    activate_output: bool = Field(False, description="the activation is on the output too")
    bias: bool = Field(True, description="whether matrices have a bias")
    signs: bool = Field(
        False, description="the last matrix is +1 for half of the neurons and -1 for the others, "
        "and not learned (Chen et al. 2022)"
    )  # fmt: skip

    def rules(self) -> Iterator[tuple[Path, str]]:
        """A plain activation, and neurons for the signs."""
        if self.activation.gated:
            sentence = f"{self.activation.kind} is gated; say one that is not, such as relu"
            yield ("activation",), sentence
        if self.signs and not self.hidden:
            yield ("signs",), "signs are for the neurons of a hidden layer; give hidden too"
        if self.signs and self.activate_output:
            yield ("activate_output",), "with signs the output is a sum, which has no activation"

    def describe(self) -> str:
        """`4 experts with 16 hidden units`."""
        kind = "linear " if not (self.hidden or self.activate_output) else ""
        what = counted(self.count, f"{kind}expert")
        if not self.hidden:
            return f"{what} of {self.activation.kind} units" if self.activate_output else what
        units = f"{listed([f'{n:,}' for n in self.hidden], 'and')} hidden {self.activation.kind}"
        return f"{what} with {units} units"

    def _matrices(self, width: int, out: int) -> Iterator[tuple[str, int, int, bool]]:
        """Name, rows, columns, and whether an activation follows, matrix by matrix."""
        for index, wide in enumerate(self.hidden):
            yield f"up_{index + 1}" if index else "up", wide, width, True
            width = wide
        if not self.signs:
            yield "down", out, width, self.activate_output

    def dense(self, b: Builder, x: Any, out: int, suffix: str) -> Any:
        """Every expert's output for every example: x [B, d] -> [B, E, n]."""
        made = None
        for name, wide, width, activated in self._matrices(b.width, out):
            weight, bias = self._parameters(b, f"{name}{suffix}", wide, width, Fraction(1))
            if made is None:
                flat = bias.flatten() if self.bias else None
                made = F.linear(x, weight.flatten(0, 1), flat)
                made = torch.unflatten(made, -1, (self.count, wide))
            else:
                made = (made.transpose(0, 1) @ weight.transpose(1, 2)).transpose(0, 1)
                made = made + bias if self.bias else made
            made = self._activated(b, made) if activated else made
        return self._summed(b, made, suffix)

    def grouped(
        self, b: Builder, rows: Any, ends: Any, out: int, suffix: str, active: Fraction
    ) -> Any:
        """rows [N, d], those of expert e up to ends[e], to its outputs [N, n]; no other runs."""
        for name, wide, width, activated in self._matrices(b.width, out):
            weight, bias = self._parameters(b, f"{name}{suffix}", wide, width, active)
            rows = grouped_linear(rows, weight, ends)
            rows = grouped_bias(rows, bias, ends) if self.bias else rows
            rows = self._activated(b, rows) if activated else rows
        return self._summed(b, rows, suffix)

    def _parameters(
        self, b: Builder, name: str, wide: int, width: int, active: Fraction
    ) -> tuple[Any, Any]:
        facts: dict[str, Any] = {"role": "routed_experts", "active": active}
        facts["compute"] = b.spec.precision.expert_dtype
        weight = b.param(name, self.count, wide, width, **facts)
        if not self.bias:
            return weight, None
        return weight, b.param(f"{name}_bias", self.count, wide, init=ZEROS, **facts)

    def _activated(self, b: Builder, x: Any) -> Any:
        rate = b.spec.train.dropout.experts
        made = self.activation.apply(x)
        return F.dropout(made, rate, b.training) if rate else made

    def _summed(self, b: Builder, neurons: Any, suffix: str) -> Any:
        """Neurons [..., n] with their signs, [..., 1]; themselves if there are none."""
        if not self.signs:
            return neurons
        count, dtype = self.hidden[-1], b.spec.precision.expert_dtype
        name = f"signs{suffix}"
        signs = b.buffer(name, 1, count, make=fixed_signs, dtype=dtype, count=count)
        return F.linear(neurons, signs)
