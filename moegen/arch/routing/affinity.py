"""Affinities: logits turned into scores that gates are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from moegen.arch.routing.routed import Site
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.sequences import softmax_over_tokens
from moegen.spec.element import Kinds


class Affinity(Kinds):
    """A map from logits to scores."""

    default_kind: ClassVar[str | None] = "softmax"
    sums_to_one: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    def scores(self, b: Builder, logits: Any, site: Site) -> Any:
        """logits [T, E] to scores [T, E]."""
        raise TypeError(f"{type(self).__name__} computes nothing")


class Softmax(Affinity):
    """Experts compete: scores of a token sum to one."""

    kind: Literal["softmax"] = "softmax"

    def says(self, setting: Setting) -> Iterator[str]:
        """Over what."""
        restrict = setting.router.restrict
        over = f"the {setting.logits}"
        if restrict and restrict.on_logits:
            over = "the experts that the token may choose"
        yield f"A softmax over {over} makes scores of them, which sum to one."

    def scores(self, b: Builder, logits: Any, site: Site) -> Any:
        """softmax over experts."""
        return logits.softmax(-1)


class Sigmoid(Affinity):
    """Each expert is judged alone (BASE layers 2021, DeepSeek-V3 2024)."""

    kind: Literal["sigmoid"] = "sigmoid"
    sums_to_one: ClassVar[bool] = False

    def says(self, setting: Setting) -> Iterator[str]:
        """Each alone."""
        yield "A sigmoid makes a score from 0 to 1 of each logit by itself."

    def scores(self, b: Builder, logits: Any, site: Site) -> Any:
        """The logistic function of each logit."""
        return logits.sigmoid()


class SoftmaxOverTokens(Affinity):
    """Tokens compete for each expert: scores of an expert sum to one (Mesh-TF expert selection)."""

    kind: Literal["softmax_over_tokens"] = "softmax_over_tokens"
    sums_to_one: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def says(self, setting: Setting) -> Iterator[str]:
        """Over what."""
        yield f"For each expert, a softmax over {setting.competing} makes scores, which sum to one."

    def scores(self, b: Builder, logits: Any, site: Site) -> Any:
        """softmax over the real tokens of a group."""
        return softmax_over_tokens(logits, site.valid, site.group)
