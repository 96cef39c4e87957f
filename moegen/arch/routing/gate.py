"""Gates: the weights with which the chosen experts' outputs are summed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from moegen.arch.routing.routed import Scored
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.routing import kept_weights
from moegen.spec.element import Element, Path
from moegen.spec.words import article, counted

GUARD = 1e-20  # as DeepSeek has it: far below any weight, far above the least number of fp32


class Gate(Element):
    """Weights of the chosen experts.

    none: their scores as they are (Switch, V-MoE, DeepSeek-V2). sum: divided by their sum
    (GShard, DeepSeek-V3). softmax_over_kept: a softmax over the chosen logits (Shazeer 2017,
    Mixtral, gpt-oss); of softmax scores it equals sum in value and gradient. constant: one each.
    count: divided by how many experts took the token, where experts choose (Mesh-TF).
    """

    shorthand = "normalize"

    normalize: Literal["none", "sum", "softmax_over_kept", "constant", "count"] = Field(
        "none", description="how the chosen experts' scores become weights"
    )
    power: float = Field(
        1.0, ge=1, le=100, description="p of the p-norm that sum divides by (MegaBlocks)"
    )
    after_drop: bool = Field(
        False, description="sum counts only what capacity kept (fairseq), not all choices (GShard)"
    )
    blend: bool = Field(
        False, description="the rest of the weight, up to one, goes to the token itself (BASE)"
    )
    scale: float = Field(1.0, gt=0, le=1e6, description="factor on the weights, last")
    scales: Literal["output", "input"] = Field(
        "output", description="what weights multiply: what experts give, or are given (Llama 4)"
    )
    eps: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="added to the sum that sum divides by; 1e-20 where it could be 0, unless given",
    )

    def rules(self) -> Iterator[tuple[Path, str]]:
        """Options that belong to sums."""
        if self.normalize != "sum":
            for name, on in (
                ("after_drop", self.after_drop),
                ("eps", bool(self.eps)),
                ("power", self.power != 1.0),
            ):
                if on:
                    yield (name,), f"{name} is for normalize: sum, not {self.normalize}"
        if self.scales == "input" and self.blend:
            yield ("blend",), "blend adds to weighted outputs, so not with scales: input"

    def says(self, setting: Setting) -> Iterator[str]:
        """How scores become weights, and what the task's loss can then teach the router."""
        select = setting.router.select
        if select.logits(setting.choices) != setting.choices or select.kind == "soft":
            return  # slots are weighed by what selects
        yield self._rule(setting)
        certain = self.normalize in ("sum", "softmax_over_kept") and not self.blend
        if self.normalize == "constant" or (certain and setting.chosen == 1 and not self.eps):
            if certain:
                yield f"Of one {setting.noun} that is 1."
            yield "So the task's loss does not train the router."
        if self.scale != 1.0:
            yield f"Weights are multiplied by {self.scale:g}."
        if self.scales == "input":
            yield "Weights multiply what an expert is given; what experts give is summed as it is."
        if self.blend:
            yield "What weights lack of 1 is the weight of the token itself, which is added."

    def _rule(self, setting: Setting) -> str:
        noun, k = setting.noun, setting.chosen
        score = f"The weight of {article(noun)} is the token's score for it"
        if self.normalize == "none":
            return f"{score}."
        if self.normalize == "constant":
            return f"The weight of {article(noun)} is 1."
        if not k:
            by = "number" if self.normalize == "count" else "sum of the scores"
            return f"{score}, divided by the {by} of the experts that took the token."
        if self.normalize == "softmax_over_kept":
            return f"Weights are the softmax of the chosen logits, {k:,} a token."
        by = "sum" if self.power == 1.0 else f"{self.power:g}-norm"
        guard = f" plus {self.eps:g}" if self.eps else ""
        those = f"its {counted(k, 'chosen score')}"
        if self.after_drop:
            those = "those of its choices that are not refused or skipped"
        elif setting.mixture.capacity and k > 1:
            those += ", refused ones included"
        return f"{score}, divided by the {by}{guard} of {those}."

    def weights(self, b: Builder, scored: Scored, experts: Any) -> Any:
        """Weights [T, k] of the chosen experts [T, k]."""
        if self.normalize == "softmax_over_kept":
            weights = scored.logits.gather(-1, experts).softmax(-1)
        else:
            weights = scored.scores.gather(-1, experts)
        if self.normalize == "constant":
            weights = weights.new_ones(weights.shape)
        if self.normalize == "sum" and not self.after_drop:
            weights = self._shares(weights, self._guard(scored))
        return weights * self.scale if self.scale != 1.0 and not self.after_drop else weights

    def over_kept(self, b: Builder, weights: Any, kept: Any, nowhere: int) -> Any:
        """Weights [T, k] divided by the sum of those that were not refused."""
        shares = kept_weights(weights, kept, nowhere, GUARD if self.eps is None else self.eps)
        return shares * self.scale if self.scale != 1.0 else shares

    def _guard(self, scored: Scored) -> float:
        """What keeps the sum from 0, where all chosen scores can be so small."""
        if self.eps is not None:
            return self.eps
        return 0.0 if scored.sure else GUARD

    def _shares(self, weights: Any, eps: float) -> Any:
        if self.power != 1.0:
            total = weights.norm(self.power, dim=-1, keepdim=True)
        else:
            total = weights.sum(-1, keepdim=True)
        return weights / (total + eps if eps else total)
