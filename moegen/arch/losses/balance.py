"""Losses that even out loads: over all tokens, groups, sequences, devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.losses.auxiliary import AuxiliaryLoss, Outcome
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.balance_losses import (
    communication_fractions,
    group_probability,
    group_shares,
    grouped_balance_loss,
    pooled_group_balance_loss,
    second_probability,
    token_balance_loss,
)
from moegen.ops.losses import (
    balance_loss,
    choice_fractions,
    masked_mean,
    pooled_balance_loss,
    sequence_balance_loss,
)
from moegen.spec.element import Path
from moegen.spec.words import counted

if TYPE_CHECKING:
    from moegen.arch.moe import MoE


class BalanceLoss(AuxiliaryLoss):
    """E * sum_e f_e P_e: share of choices times mean score (GShard 2020, Switch 2021).

    count says what f counts: first choices only, all k choices (balanced value k), or all
    divided by k (balanced value 1), or second choices against what first ones leave (Mesh-TF).
    reduction "pooled" averages f and P over layers before the product, as transformers' models do;
    of each sequence apart where tokens are balanced in groups (its Switch).
    """

    kind: Literal["balance"] = "balance"
    by_group: ClassVar[bool] = True
    needs_loads: ClassVar[bool] = True
    count: Literal["first", "all", "mean", "second"] = Field(
        "mean", description="choices that f counts"
    )
    after_capacity: bool = Field(
        False, description="f counts what capacity kept (st-moe-pytorch), not what was chosen"
    )
    reduction: Literal["sum", "mean", "pooled"] = Field(  # type: ignore[assignment]
        "sum", description="over the routed layers"
    )

    def rules(self) -> Iterator[tuple[Path, str]]:
        """Pooled statistics are of all choices."""
        if self.pooled and self.count in ("first", "second"):
            yield ("count",), "the pooled loss counts all choices; use count all or mean"
        if self.pooled and self.after_capacity:
            yield ("after_capacity",), "the pooled loss counts what was chosen"

    def check(self, moe: MoE) -> Iterator[tuple[Path, str]]:
        """What it needs of the layer."""
        yield from super().check(moe)
        if self.count == "second" and moe.chosen < 2:
            yield ("count",), "there are no second choices to count"
        if self.after_capacity and not moe.capacity:
            yield ("after_capacity",), "there is no capacity, so all that is chosen is kept"
        if self.pooled and moe.experts.nested:
            yield ("reduction",), "a pooled loss knows no mixtures inside experts"
        if moe.group != "batch" and self.count == "second":
            yield ("count",), "second choices are counted over the batch only"

    def what(self, setting: Setting) -> str:
        """Which choices are counted, among which tokens."""
        k = setting.chosen
        share = {
            "first": "first choices" if k > 1 else "choices",
            "second": "second choices",
            "mean": f"choices divided by {k:,}" if k > 1 else "choices",
            "all": f"all {k:,} choices" if k > 1 else "choices",
        }[self.count]
        share += " that are not refused" if self.after_capacity else ""
        mean = "share of what first choices leave of scores" if self.count == "second" else "score"
        among = {"sequence": f" within each {setting.whole}", "run": f" within {setting.competing}"}
        even = f" ({k if self.count == 'all' else 1} where loads are even)"
        even = even if setting.router.affinity.sums_to_one and not self.after_capacity else ""
        return (
            f"the sum over experts of their share of {share} times their mean {mean}"
            f"{among.get(setting.moe.group_kind, '')}, times {setting.choices:,}{even}"
        )

    @property
    def pooled(self) -> bool:
        """Whether statistics are averaged over layers before the product."""
        return self.reduction == "pooled"

    def of_layer(self, b: Builder, outcome: Outcome) -> Any:
        """The loss of this layer's statistics."""
        scored, routed = outcome.scored, outcome.routed
        experts = routed.kept if self.after_capacity else routed.choices
        if scored.site.group is not None:
            counted = experts[:, :1] if self.count == "first" else experts
            divide = self.count != "all"
            return grouped_balance_loss(
                scored.scores, counted, scored.valid, scored.site.group, divide
            )
        if self.count == "second":
            rest = second_probability(scored.scores, experts, scored.valid)
            return balance_loss(self._share(outcome, experts[:, 1:2]), rest)
        if self.count == "first":
            return balance_loss(self._share(outcome, experts[:, :1]), outcome.probability)
        choices = outcome.moe.chosen
        if self.after_capacity:
            share = self._share(outcome, experts)
            share = share / choices if self.count == "mean" and choices > 1 else share
        else:
            share = choice_fractions(routed.load, choices if self.count == "all" else 1)
        return balance_loss(share, outcome.probability)

    def _share(self, outcome: Outcome, experts: Any) -> Any:
        """Share of real tokens that chose each expert, of choices [T, k]."""
        choices = outcome.moe.num_choices
        if self.after_capacity:  # refused choices are of expert number `choices`
            made = F.one_hot(experts, choices + 1)[..., :choices]
        else:
            made = F.one_hot(experts, choices)
        return masked_mean(made.sum(1), outcome.scored.valid)

    def pools(self, b: Builder, outcome: Outcome) -> dict[str, Any]:
        """Statistics of each group, where tokens are balanced in groups."""
        scored = outcome.scored
        if not self.pooled or scored.site.group is None:
            return {}
        group, valid = scored.site.group, scored.valid
        shares = group_shares(outcome.routed.choices, outcome.moe.num_choices, valid, group)
        probabilities = group_probability(scored.scores, valid, group)
        return {"shares": shares, "probabilities": probabilities}

    def over_layers(self, b: Builder, name: str, routing: Any, moe: MoE) -> Any:
        """Reduced as the spec says."""
        if self.pooled and moe.group_kind != "batch":
            return pooled_group_balance_loss(routing, 1 if self.count == "all" else moe.chosen)
        if self.pooled:
            return pooled_balance_loss(routing, moe.chosen if self.count == "all" else 1)
        return super().over_layers(b, name, routing, moe)


class SequenceBalanceLoss(AuxiliaryLoss):
    """Balance inside every sequence (DeepSeek-V3, arXiv:2412.19437, section 2.1.2)."""

    kind: Literal["sequence_balance"] = "sequence_balance"
    needs_loads: ClassVar[bool] = True

    def what(self, setting: Setting) -> str:
        """As balance, one sequence at a time."""
        return (
            "the sum over experts of their share of choices times their mean share of scores "
            f"within each {setting.whole}, times {setting.choices:,} (1 where loads are even)"
        )

    def of_layer(self, b: Builder, outcome: Outcome) -> Any:
        """The loss of this layer's sequences."""
        scored = outcome.scored
        batch, _ = scored.site.sequences
        return sequence_balance_loss(scored.scores, outcome.routed.choices, scored.valid, batch)


class _DeviceLoss(AuxiliaryLoss):
    """Of groups of experts that stand on one device each."""

    needs_loads: ClassVar[bool] = True
    devices: int = Field(
        ge=1, le=10**6, description="groups of equal size that experts form", examples=[4]
    )

    def check(self, moe: MoE) -> Iterator[tuple[Path, str]]:
        """Groups of equal size."""
        yield from super().check(moe)
        if moe.num_choices % self.devices:
            sentence = f"devices ({self.devices}) must divide the {moe.num_choices} experts"
            yield ("devices",), sentence
        if self.devices == 1:
            yield ("devices",), "one device has all experts, so there is nothing to balance"
        if moe.experts.free:
            yield (), f"experts without parameters stand on no device; remove {self.kind}"

    def _probability(self, outcome: Outcome) -> Any:
        """Summed mean scores of each device's experts [D]."""
        of_experts = torch.unflatten(outcome.probability, 0, (self.devices, -1))
        p = of_experts.sum(-1)
        return p


class DeviceBalanceLoss(_DeviceLoss):
    """sum over devices of mean f times summed P (DeepSeekMoE 2024, section 3.3)."""

    kind: Literal["device_balance"] = "device_balance"

    def what(self, setting: Setting) -> str:
        """As balance, of devices."""
        size = setting.choices // self.devices
        return (
            f"the sum over {self.devices:,} devices of {counted(size, 'expert')} each of their "
            "mean share of choices times their summed mean scores"
        )

    def of_layer(self, b: Builder, outcome: Outcome) -> Any:
        """The loss of this layer's devices."""
        experts = outcome.moe.num_choices
        f = choice_fractions(outcome.routed.load, 1) * experts
        f = torch.unflatten(f, 0, (self.devices, -1)).mean(-1).detach()
        return (f * self._probability(outcome)).sum()


class CommunicationBalanceLoss(_DeviceLoss):
    """As device balance, f being tokens that are sent to each device (DeepSeek-V2, 2024)."""

    kind: Literal["communication_balance"] = "communication_balance"
    limit: int = Field(
        ge=1, le=10**6, description="devices that a token is sent to at most", examples=[2]
    )

    def what(self, setting: Setting) -> str:
        """As device balance, of what is sent."""
        return (
            f"the sum over {self.devices:,} devices of their share of tokens, of which each is "
            f"sent to at most {self.limit:,}, times their summed mean scores"
        )

    def of_layer(self, b: Builder, outcome: Outcome) -> Any:
        """The loss of this layer's devices."""
        scored, choices = outcome.scored, outcome.routed.choices
        size = outcome.moe.num_choices // self.devices
        f = communication_fractions(choices, size, self.devices, self.limit, scored.valid)
        return (f * self._probability(outcome)).sum()


class TokenBalanceLoss(AuxiliaryLoss):
    """Where experts choose: every token should be wanted as much as any other (Mesh-TF)."""

    kind: Literal["token_balance"] = "token_balance"
    by_group: ClassVar[bool] = True
    needs_choices: ClassVar[bool] = False

    def what(self, setting: Setting) -> str:
        """Tokens in the place of experts."""
        return "how unevenly tokens are wanted by the experts (1 where evenly)"

    def check(self, moe: MoE) -> Iterator[tuple[Path, str]]:
        """Scores that tokens compete for."""
        yield from super().check(moe)
        if moe.router.affinity.kind != "softmax_over_tokens":
            yield (), "token_balance needs affinity softmax_over_tokens"

    def of_layer(self, b: Builder, outcome: Outcome) -> Any:
        """The loss of this layer's tokens."""
        scored = outcome.scored
        return token_balance_loss(scored.scores, scored.valid, scored.site.group)
