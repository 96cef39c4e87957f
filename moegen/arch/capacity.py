"""Capacity: how many tokens an expert takes, whose come first, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

from pydantic import Field

from moegen.arch.routing.routed import Mixture, Scored
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.capacity import expert_capacity, in_mode, share_of_tokens
from moegen.ops.losses import dropped_fraction
from moegen.ops.places import next_best, position_in_expert, refuse, sparing
from moegen.ops.routing import top_k
from moegen.spec.element import Element, Path
from moegen.spec.words import counted


class Capacity(Element):
    """A bound on the rows of each expert.

    Two conventions are in use: per_token does not multiply by k (Mesh-TF, Switch, ST-MoE),
    per_choice does (V-MoE, MegaBlocks); per_rank (Tutel) multiplies what is rounded for one
    choice. Who is beyond it keeps the residual path alone.
    """

    shorthand = "factor"

    factor: float = Field(1.0, gt=0, le=1e6, description="room in training, 1 is an even share")
    eval_factor: float | Literal["unlimited"] | None = Field(
        None, description="in evaluation: a factor, or unlimited; as factor unless given"
    )
    eval_share: float | None = Field(
        None, gt=0, le=1, description="in evaluation: this share of all tokens (fairseq)"
    )
    slots: int | None = Field(None, ge=1, le=10**9, description="so many, whatever the batch")
    convention: Literal["per_token", "per_choice", "per_rank"] = Field(
        "per_token", description="whether an even share counts tokens, or choices (k a token)"
    )
    minimum: int = Field(0, ge=0, le=10**6, description="slots that an expert always has")
    rounding: Literal["floor", "ceil", "nearest"] = Field("floor", description="to whole slots")
    round_first: Literal["nothing", "share_down", "share_up", "tokens_up"] = Field(
        "nothing", description="what is rounded first: tokens / experts, or factor * tokens"
    )
    multiple: int = Field(1, ge=1, le=10**6, description="slots are raised to a multiple of this")
    multiple_above: int = Field(
        0, ge=0, le=10**6, description="only if there are more than so many (praxis: 1)"
    )
    at_most_tokens: bool = Field(
        False, description="before the minimum, no more slots than tokens (Mesh-TF)"
    )
    devices: int | None = Field(
        None, ge=1, le=10**6, description="bound the load of so many groups of experts instead"
    )
    spare: float = Field(
        0.0, ge=0, lt=1, description="share of sequences that are never refused (DeepSeek-V2)"
    )
    priority: Literal["rank", "confidence", "confidence_sum", "weight"] = Field(
        "rank",
        description="who comes first: all first choices in token order, then all second; tokens of "
        "the highest best score, or sum of weights, first (BPR); or choices of the highest weight",
    )
    overflow: Literal["drop", "next", "input"] = Field(
        "drop",
        description="a refused choice adds nothing; goes to the token's next best expert (no token "
        "left behind); or adds the token itself, weighted",
    )
    passes: int = Field(4, ge=2, le=64, description="experts that a token tries with next")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """Ways of saying how many, one at a time."""
        factor = self.eval_factor
        if isinstance(factor, float) and not 0 < factor <= 1e6:
            yield ("eval_factor",), f"eval_factor is {factor:g} but must be above 0"
        if self.eval_share is not None and factor is not None:
            yield ("eval_share",), "eval_factor says already how many there are in evaluation"
        if self.slots is not None:
            others = {"factor", "eval_factor", "eval_share", "convention", "rounding"}
            others |= {"round_first", "minimum", "multiple", "multiple_above", "at_most_tokens"}
            for name in sorted(others & self.model_fields_set):
                if getattr(self, name) != type(self).model_fields[name].default:
                    yield (name,), f"slots says already how many there are, so {name} has no say"
        if (
            self.devices
            and self.convention != "per_choice"
            and "convention" in self.model_fields_set
        ):
            yield ("convention",), "devices count choices, so convention has no say"
        if self.multiple_above and self.multiple == 1:
            yield ("multiple_above",), "nothing is raised to a multiple; give multiple too"
        if "passes" in self.model_fields_set and self.overflow != "next":
            yield ("passes",), f"passes is for overflow: next, not {self.overflow}"

    def leak(self, chosen: int) -> str | None:
        """How later tokens have a say in what becomes of an earlier one, if they do."""
        if self.priority != "rank":
            return f"with priority {self.priority} later tokens can take an earlier one's place"
        if self.overflow == "next":
            return "with overflow next a later token can take what an earlier one would try next"
        if chosen > 1:
            return (
                "later tokens' first choices can take the place of an earlier one's second choice"
            )
        return None

    def check(self, experts: int, chosen: int, second: bool) -> Iterator[tuple[Path, str]]:
        """Rules that need the number of experts and of choices."""
        if self.devices and experts % self.devices:
            yield ("devices",), f"devices ({self.devices}) must divide the {experts} experts"
        if self.overflow == "next":
            if chosen != 1:
                yield ("overflow",), f"next is for one choice a token, not {chosen}"
            if self.priority != "rank":
                yield ("priority",), f"with overflow: next, places go by rank, not {self.priority}"
            if self.passes > experts:
                sentence = f"passes is {self.passes} but there are only {experts} experts"
                if "passes" in self.model_fields_set:
                    yield ("passes",), sentence
            if self.spare:
                yield (
                    ("spare",),
                    "with overflow: next, tokens are placed, not refused; remove spare",
                )
            if self.devices:
                yield ("devices",), "next looks for an expert with room, not for a device"
        if self.overflow == "input" and second:
            yield ("overflow",), "input would also add what second choices skip; use drop"

    # Sentences

    def says(self, setting: Setting) -> Iterator[str]:
        """How many slots there are, who gets them, and what becomes of the others."""
        yield from self._slots(setting)
        if self.spare:
            yield (
                f"In training each {setting.whole} is spared with probability {self.spare:g}: "
                "none of its choices is refused."
            )
        yield self._order(setting.chosen)
        yield from self._refused(setting)

    def _slots(self, setting: Setting) -> Iterator[str]:
        experts = setting.moe.num_experts
        each = f"Each of {counted(experts, 'expert')}"
        if self.devices:
            size = counted(experts // self.devices, "expert")
            each = f"Each of {self.devices:,} devices, with {size},"
        training, evaluation = (setting.room(training=mode) for mode in (True, False))
        of = f"of {setting.competing}"
        if self.slots is not None:
            yield f"{each} has room for {counted(training, 'choice')} {of}."
            return
        room = f"{each} has room for {counted(training, 'choice')} {of} in training"
        if self.eval_factor == "unlimited":
            yield f"{room} (factor {self.factor:g}), and for all in evaluation."
            return
        mode = "and" if evaluation == training else f"and {evaluation:,}"
        yield f"{room} {mode} in evaluation: {self._formula(setting.chosen)}."

    def _formula(self, chosen: int) -> str:
        """What the slots come from, in words."""
        shares = {"per_choice": "choices", "per_rank": "tokens for each rank of choices"}
        share = shares.get("per_choice" if self.devices else self.convention, "tokens")
        share = share if chosen > 1 else "tokens"
        of = f"{self.factor:g} times an even share of {share}"
        if self.round_first == "tokens_up":
            of = f"an even share of {share}, of {self.factor:g} times the tokens, rounded up"
        how = {"share_down": " (itself rounded down)", "share_up": " (itself rounded up)"}
        parts = [of + how.get(self.round_first, "")]
        parts.append({"floor": "rounded down", "ceil": "rounded up"}.get(self.rounding, "rounded"))
        parts += ["at most one a token"] if self.at_most_tokens else []
        parts += [f"at least {self.minimum:,}"] if self.minimum else []
        above = f" if above {self.multiple_above:,}" if self.multiple_above else ""
        raised = f"raised to a multiple of {self.multiple:,}{above}"
        parts += [raised] if self.multiple > 1 else []
        if self.eval_share is not None:
            parts[-1] += f"; in evaluation {self.eval_share:g} times all tokens, rounded up"
        other = isinstance(self.eval_factor, float) and self.eval_factor != self.factor
        return ", ".join(parts) + (f"; in evaluation {self.eval_factor:g} times" if other else "")

    def _order(self, chosen: int) -> str:
        first = {
            "rank": "earlier tokens come first",
            "confidence": "tokens with the highest best score come first",
            "confidence_sum": "tokens with the highest sum of weights come first",
        }
        if self.priority == "weight":
            return "Choices with the highest weights come first."
        if chosen == 1:
            return f"{first[self.priority].capitalize()}; padding takes no slot."
        ranks = "all first choices come before all second ones"
        ranks += " and so on" if chosen > 2 else ""
        return f"{ranks.capitalize()}, and within these {first[self.priority]}."

    def _refused(self, setting: Setting) -> Iterator[str]:
        moe, one = setting.moe, setting.chosen == 1
        rest = "the residual stream"
        rest += " and what is added below" if moe.shared or moe.residual else ""
        if self.overflow == "next":
            tries = min(self.passes, moe.num_experts)
            yield f"A refused token tries its next best experts, {tries} in all with its first."
            yield f"One that finds no room is left with {rest} alone."
        elif self.overflow == "input":
            yield "A refused choice adds the token itself in place of the expert's output."
        elif one:
            yield f"A refused token is left with {rest} alone."
        else:
            yield "A refused choice adds nothing."
            yield f"A token refused everywhere is left with {rest} alone."
        if moe.experts.free:
            yield "Experts without parameters refuse nobody."

    # How many

    def room(self, b: Builder, scored: Scored, chosen: int, experts: int) -> Any:
        """Slots of each expert, or of each device's experts, a whole number."""
        site = scored.site
        if self.slots is not None:
            return self.slots
        size = scored.tokens.shape[0] if site.group is None else site.group
        slots = self._room(b, size, chosen, self.devices or experts)
        if self.eval_share is not None:
            return in_mode(b.training, slots, share_of_tokens(size, self.eval_share))
        if self.eval_factor == "unlimited":
            return in_mode(b.training, slots, size * chosen)
        return slots

    def slots_of(self, tokens: int, moe: Mixture) -> int:
        """Slots of each expert in training, for so many tokens that compete."""
        if self.slots is not None:
            return self.slots
        chosen = moe.router.select.chosen(moe.granularity, moe.num_choices)
        training: Any = SimpleNamespace(training=True)
        return int(self._room(training, tokens, chosen, self.devices or moe.num_experts))

    def _room(self, b: Builder, tokens: Any, chosen: int, experts: int) -> Any:
        factor: Any = self.factor
        if isinstance(self.eval_factor, float) and self.eval_factor != self.factor:
            factor = in_mode(b.training, self.factor, self.eval_factor)
        per_choice = self.convention == "per_choice" or self.devices
        choices = tokens * chosen if per_choice and chosen > 1 else tokens
        options: dict[str, Any] = {}
        if self.rounding != "floor":
            options["rounding"] = self.rounding
        if self.round_first != "nothing":
            options["round_first"] = self.round_first
        if self.convention == "per_rank" and chosen > 1:
            options["times"] = chosen
        if self.at_most_tokens:
            options["maximum"] = tokens
        if self.minimum:
            options["minimum"] = self.minimum
        if self.multiple != 1:
            options["multiple"] = self.multiple
        if self.multiple_above:
            options["multiple_above"] = self.multiple_above
        if self.round_first == "tokens_up" and per_choice and chosen > 1:
            options["times_first"] = chosen
            choices = tokens
        return expert_capacity(choices, experts, factor, **options)

    # Who

    def admitted(
        self, b: Builder, moe: Mixture, scored: Scored, experts: Any, weights: Any, load: Any
    ) -> tuple[Any, Any]:
        """experts [T, k] with `num_choices` where refused or padding, and the fraction refused."""
        nowhere, valid = moe.num_choices, scored.valid
        chosen = moe.router.select.chosen(moe.granularity, nowhere)
        asked = experts.masked_fill(~valid.unsqueeze(-1), nowhere)
        slots = self.room(b, scored, chosen, moe.num_experts)
        options: dict[str, Any] = {}
        if scored.site.group is not None:
            options["group"] = scored.site.group
        if self.priority == "confidence":
            options["priority"] = scored.scores.amax(-1)
        elif self.priority == "confidence_sum":
            options["priority"] = weights.sum(-1)
        elif self.priority == "weight":
            options["priority"] = weights
        keys, count = asked, nowhere
        if self.devices:
            # Refused choices and free experts are beyond the last device.
            keys, count = asked // (moe.num_experts // self.devices), self.devices
            keys = keys.clamp(max=count)
        position = position_in_expert(keys, count, **options)
        spared = None
        if self.spare:
            spared = sparing(valid, scored.site.sequences[0], self.spare, b.training)
        kept = refuse(asked, position, slots, nowhere, moe.num_experts, spared)
        return kept, dropped_fraction(kept, load, nowhere)

    def rerouted(self, b: Builder, scored: Scored, experts: int, load: Any) -> tuple[Any, Any]:
        """One expert [T, 1] with room for each token, and the fraction that found none."""
        slots = self.room(b, scored, 1, experts)
        wanted = top_k(scored.ranked, min(self.passes, experts))
        kept = next_best(wanted, experts, slots, scored.valid, scored.site.group)
        return kept, dropped_fraction(kept, load, experts)
