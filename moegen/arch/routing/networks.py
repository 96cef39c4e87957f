"""Scores by more than one product: small networks, and trees of gates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.init import ZEROS
from moegen.arch.routing.routed import Site
from moegen.arch.routing.score import Score
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.spec.words import listed

Width = Annotated[int, Field(ge=1, le=10**6)]


class NetworkScore(Score):
    """A small network gives the logits: Eigen et al. 2013 have two layers of 50 units."""

    kind: Literal["network"] = "network"
    per_site: ClassVar[bool] = False
    hidden: tuple[Width, ...] = Field(
        min_length=1, description="widths of its hidden layers", examples=[[50, 50]]
    )
    activation: Literal["relu", "tanh"] = Field("relu", description="after each hidden layer")
    bias: bool = Field(True, description="whether its layers have biases")

    def says(self, setting: Setting) -> Iterator[str]:
        """How wide it is."""
        wide = listed([f"{n:,}" for n in self.hidden], "and")
        precision = setting.spec.precision.router
        network = f"A network ({self.activation}, {wide} wide)"
        yield f"{network} gives each of {setting.logits} a logit, in {precision}."

    def logits(self, b: Builder, tokens: Any, site: Site) -> Any:
        """Layer by layer; the last one has a row an expert."""
        dtype, width, made = b.spec.precision.router_dtype, b.width, tokens
        if dtype != b.spec.precision.compute_dtype:
            made = made.to(dtype)
        facts: dict[str, Any] = {"dtype": dtype, "role": "router"}
        for index, wide in enumerate((*self.hidden, site.choices)):
            name = f"router_{index + 1}" if index < len(self.hidden) else "router"
            weight = b.param(name, wide, width, **facts)
            bias = b.param(f"{name}_bias", wide, init=ZEROS, **facts) if self.bias else None
            made, width = F.linear(made, weight, bias), wide
            if index < len(self.hidden):
                made = F.relu(made) if self.activation == "relu" else torch.tanh(made)
        return made


class TreeScore(Score):
    """A tree of linear gates, whose leaves are the experts (Jordan and Jacobs 1994).

    A leaf's logit is the logarithm of the product of the gates on the way to it, so that a softmax
    gives that product back.
    """

    kind: Literal["tree"] = "tree"
    per_site: ClassVar[bool] = False
    branches: tuple[Annotated[int, Field(ge=2, le=10**6)], ...] = Field(
        min_length=1,
        max_length=20,
        description="branches of every node, level by level",
        examples=[[2, 4]],
    )
    bias: bool = Field(True, description="whether gates have a bias")

    @property
    def leaves(self) -> int:
        """Experts at the end of its branches."""
        return math.prod(self.branches)

    def says(self, setting: Setting) -> Iterator[str]:
        """How deep it is."""
        levels = " x ".join(map(str, self.branches))
        precision = setting.spec.precision.router
        yield f"A tree of linear gates, {levels} branches, has {setting.experts} as its leaves."
        yield f"A leaf's logit is the sum of the log gates on the way to it, in {precision}."

    def logits(self, b: Builder, tokens: Any, site: Site) -> Any:
        """From the root down; a level has a matrix for each of its nodes."""
        dtype, seen = b.spec.precision.router_dtype, tokens
        if dtype != b.spec.precision.compute_dtype:
            seen = seen.to(dtype)
        facts: dict[str, Any] = {"dtype": dtype, "role": "router"}
        paths, nodes = None, 1
        for level, branches in enumerate(self.branches):
            name = f"router_{level + 1}"
            weight = b.param(name, nodes, branches, b.width, **facts)
            bias = None
            if self.bias:
                bias = b.param(f"{name}_bias", nodes, branches, init=ZEROS, **facts).flatten()
            values = F.linear(seen, weight.flatten(0, 1), bias)
            gates = torch.unflatten(values, -1, (nodes, branches)).log_softmax(-1)
            paths = gates if paths is None else gates + paths.unsqueeze(-1)
            paths = paths.flatten(1)
            nodes *= branches
        return paths
