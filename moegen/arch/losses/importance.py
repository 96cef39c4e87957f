"""Losses of variation: importance and load (Shazeer et al. 2017, V-MoE 2021), and the z-loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from moegen.arch.losses.auxiliary import AuxiliaryLoss, Outcome
from moegen.arch.routing.routed import Routed, Scored
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.importance import (
    cv_squared,
    dense_gates,
    nested_importance,
    nested_load,
    sum_of_real,
    top_k_probability,
)
from moegen.ops.losses import z_loss
from moegen.spec.element import Path
from moegen.spec.words import counted

if TYPE_CHECKING:
    from moegen.arch.moe import MoE


class _Variation(AuxiliaryLoss):
    """The squared coefficient of variation of something of every expert."""

    unbiased: bool = Field(
        False, description="variance over E - 1 (FastMoE, Tutel, Mod-Squad), not over E"
    )

    def _variation(self, setting: Setting) -> str:
        """`the squared coefficient of variation, over 8 experts,`."""
        inside = "inner " if setting.moe.experts.nested else ""
        experts = counted(
            setting.moe.total_experts if inside else setting.choices, f"{inside}expert"
        )
        unbiased = " and without bias" if self.unbiased else ""
        return f"the squared coefficient of variation, over {experts}{unbiased},"


class ImportanceLoss(_Variation):
    """CV^2 of each expert's sum of gates (Shazeer et al. 2017), or of clean scores (V-MoE)."""

    kind: Literal["importance"] = "importance"
    of: Literal["gates", "scores"] = Field(
        "gates", description="gates of the chosen; or scores of all, without noise"
    )

    def check(self, moe: MoE) -> Iterator[tuple[Path, str]]:
        """Inside experts there are gates alone."""
        yield from super().check(moe)
        if self.of == "scores" and moe.experts.nested:
            yield ("of",), "scores are not for mixtures inside experts"

    def what(self, setting: Setting) -> str:
        """Of weights or of scores."""
        of = "weights" if self.of == "gates" else "noiseless scores"
        return f"{self._variation(setting)} of the sum of {of}"

    def of_layer(self, b: Builder, outcome: Outcome) -> Any:
        """The loss of this layer; of the experts inside experts if there are any."""
        scored, routed, inside = outcome.scored, outcome.routed, outcome.inside
        if inside is not None:
            inner = dense_gates(
                inside.routed.weights, inside.routed.choices, inside.scored.site.choices
            )
            sums = nested_importance(inside.outer, inner, inside.ends)
            return cv_squared(sums, self.unbiased)
        if self.of == "gates":
            gates = dense_gates(routed.weights, routed.choices, outcome.moe.num_choices)
        else:
            path = ("router", "affinity")
            affinity = outcome.moe.router.affinity
            gates = b.inline(affinity, "scores", scored.clean, scored.site, path=path)
        return cv_squared(sum_of_real(gates, scored.valid), self.unbiased)


class LoadLoss(_Variation):
    """CV^2 of each expert's chance to be chosen if only its own noise were drawn again.

    threshold excluding: against the k-th best of the other experts (Shazeer et al. 2017);
    kth: against the k-th best of all (V-MoE 2021). In evaluation chances are certainties.
    """

    kind: Literal["load"] = "load"
    needs_loads: ClassVar[bool] = True
    threshold: Literal["excluding", "kth"] = Field(
        "excluding", description="what an expert's logit must exceed"
    )
    of: Literal["logits", "scores"] = Field(
        "logits",
        description="what is held against it; scores against a logit is what Tutel has (GMoE)",
    )

    def what(self, setting: Setting) -> str:
        """Against what."""
        others = "the others" if self.threshold == "excluding" else "all"
        others += " logits, with scores in place of logits" if self.of == "scores" else ""
        return (
            f"{self._variation(setting)} of the expected load if only the noise of one expert were "
            f"drawn again, against the k-th best of {others}"
        )

    def check(self, moe: MoE) -> Iterator[tuple[Path, str]]:
        """Normal noise, in every router whose choices are counted."""
        yield from super().check(moe)
        routers = [moe.router]
        routers += [moe.experts.nested.router] if moe.experts.nested else []
        for router in routers:
            noise = router.noise
            if noise is None or noise.kind not in ("gaussian", "learned") or noise.selection_only:
                yield (), "load needs noise gaussian or learned that gates see too"
        if self.of == "scores" and moe.experts.nested:
            yield ("of",), "scores are not for mixtures inside experts"

    def of_layer(self, b: Builder, outcome: Outcome) -> Any:
        """The loss of this layer; of the experts inside experts if there are any."""
        chances = self._chances(b, outcome.scored, outcome.routed, outcome.moe)
        expected = sum_of_real(chances, outcome.scored.valid)
        inside = outcome.inside
        if inside is not None:
            inner = self._chances(b, inside.scored, inside.routed, outcome.moe)
            expected = nested_load(expected, inner, inside.ends, inside.scored.valid)
        return cv_squared(expected, self.unbiased)

    def _chances(self, b: Builder, scored: Scored, routed: Routed, moe: MoE) -> Any:
        k = routed.choices.shape[-1]
        excluding = self.threshold == "excluding"
        clean, noisy, deviation = scored.clean, scored.logits, scored.deviation
        if self.of == "scores":
            affinity = moe.router.affinity
            path = ("router", "affinity")
            clean = b.inline(affinity, "scores", clean, scored.site, path=path)
        return top_k_probability(clean, noisy, deviation, k, excluding, b.training)


class ZLoss(AuxiliaryLoss):
    """mean LSE(logits)^2, which keeps router logits small (ST-MoE, Zoph et al. 2022)."""

    kind: Literal["z"] = "z"
    needs_choices: ClassVar[bool] = False

    def what(self, setting: Setting) -> str:
        """Of all logits."""
        return "the mean squared log-sum-exp of a token's logits"

    def of_layer(self, b: Builder, outcome: Outcome) -> Any:
        """The loss of this layer's logits."""
        return z_loss(outcome.scored.logits, outcome.scored.valid)
