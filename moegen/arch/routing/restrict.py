"""Restrictions: which experts a token may choose from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from moegen.arch.routing.ids import TOKEN, IdName, named
from moegen.arch.routing.routed import Site
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.routing import top_k
from moegen.ops.scores import partition
from moegen.ops.tables import visible_experts
from moegen.spec.element import Kinds, Path
from moegen.spec.words import counted, listed


class Restriction(Kinds):
    """Sets forbidden experts to minus infinity.

    on_logits: before scores are made of them, so that the allowed ones' scores sum to one;
    otherwise for selection only.
    """

    default_kind: ClassVar[str | None] = "groups"
    on_logits: ClassVar[bool] = False

    def ids(self) -> tuple[str, ...]:
        """Names of the ids that it reads."""
        return ()

    def allowed(self, b: Builder, scores: Any, site: Site) -> Any:
        """scores or logits [T, E], minus infinity where an expert may not be chosen."""
        raise TypeError(f"{type(self).__name__} computes nothing")

    def check(self, experts: int, chosen: int) -> Iterator[tuple[Path, str]]:
        """Rules that need the number of experts and of choices."""
        yield from ()


class Groups(Restriction):
    """The best groups of experts only: DeepSeek-V2 (by max), DeepSeek-V3 (by top2_sum)."""

    kind: Literal["groups"] = "groups"
    groups: int = Field(
        ge=1, description="groups of equal size that the experts form", examples=[4]
    )
    keep: int = Field(ge=1, description="groups a token may choose from", examples=[2])
    by: Literal["max", "top2_sum"] = Field("max", description="what ranks the groups")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """No more groups kept than there are."""
        if self.keep > self.groups:
            yield ("keep",), f"keep is {self.keep} but there are only {self.groups} groups"
        if self.keep == self.groups:
            yield ("keep",), "all groups are kept, so nothing is restricted; remove restrict"

    def check(self, experts: int, chosen: int) -> Iterator[tuple[Path, str]]:
        """Groups of equal size, with enough experts in those kept."""
        if experts % self.groups:
            yield ("groups",), f"groups ({self.groups}) must divide the {experts} experts"
            return
        size = experts // self.groups
        if self.by == "top2_sum" and size < 2:
            yield ("by",), f"top2_sum needs two experts a group, but groups have {size}"
        if self.keep * size < chosen:
            sentence = f"{self.keep} x {size} experts are fewer than the {chosen} that are chosen"
            yield ("keep",), sentence

    def says(self, setting: Setting) -> Iterator[str]:
        """Which groups, and which are best."""
        size = setting.choices // self.groups
        scores = setting.ranked
        best = f"sum of the two best {scores}" if self.by == "top2_sum" else f"best of {scores}"
        keep = "group" if self.keep == 1 else f"{self.keep} groups"
        yield f"The {setting.experts} form {counted(self.groups, 'group')} of {size:,}."
        yield f"A token may choose from the {keep} with the highest {best}."

    def allowed(self, b: Builder, scores: Any, site: Site) -> Any:
        """Minus infinity outside the best `keep` groups."""
        grouped = scores.unflatten(-1, (self.groups, -1))
        pair = self.by == "top2_sum"
        rank = grouped.topk(2, dim=-1).values.sum(-1) if pair else grouped.amax(-1)
        best = top_k(rank, self.keep)
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


class Visible(Restriction):
    """Each token id sees a few experts, drawn once (MaskMoE, Su et al. 2024, arXiv:2407.09816).

    Rare ids see fewer than frequent ones, so that what little there is of them trains the same
    expert. Which ids are frequent is Zipf's law's guess, ids being in order of frequency; fill the
    buffer `visible` by `visible_experts` from your own counts to know it.
    """

    kind: Literal["visible"] = "visible"
    on_logits: ClassVar[bool] = True
    frequent: int = Field(ge=1, description="experts that a frequent id sees", examples=[4])
    rare: int = Field(1, ge=1, description="experts that a rare id sees")
    coverage: float = Field(0.8, gt=0, le=1, description="share of text that is frequent ids")
    seed: int = Field(0, ge=0, lt=2**31, description="of the drawing")

    def ids(self) -> tuple[str, ...]:
        """The model's own input."""
        return (TOKEN,)

    def check(self, experts: int, chosen: int) -> Iterator[tuple[Path, str]]:
        """Every id sees as many as are chosen, and no more than there are."""
        for name in ("frequent", "rare"):
            seen = getattr(self, name)
            if seen > experts:
                yield (name,), f"{name} is {seen} but there are only {experts} experts"
            if seen < chosen:
                yield (name,), f"{name} is {seen}, fewer than the {chosen} that are chosen"
        if self.frequent == self.rare == experts:
            yield (), "every id sees every expert, so nothing is restricted; remove restrict"

    def says(self, setting: Setting) -> Iterator[str]:
        """How many each id sees."""
        rare = f"{self.rare:,}, drawn once with seed {self.seed}"
        yield f"A token may choose from the experts that its id sees, of {setting.experts}."
        yield (
            f"Frequent ids, which make up {100 * self.coverage:g} % of text by Zipf's law, see "
            f"{self.frequent:,} and rare ones {rare}."
        )

    def allowed(self, b: Builder, scores: Any, site: Site) -> Any:
        """Minus infinity where the token's id does not see the expert."""
        size = b.spec.model.vocab_size
        visible = b.buffer(
            "visible",
            *(size, site.choices),
            make=visible_experts,
            dtype=torch.bool,
            persistent=True,
            ids=size,
            experts=site.choices,
            frequent=self.frequent,
            rare=self.rare,
            coverage=self.coverage,
            seed=self.seed,
        )
        return scores.masked_fill(~visible[site.ids[TOKEN]], float("-inf"))


class Partition(Restriction):
    """Each id has experts of its own, such as those of images and those of text."""

    kind: Literal["partition"] = "partition"
    on_logits: ClassVar[bool] = True
    id: IdName = Field(
        description="name of the ids that forward is given, e.g. modality", examples=["modality"]
    )
    experts: tuple[int, ...] = Field(
        min_length=1, description="experts of id 0, of id 1, ...", examples=[[4, 4]]
    )

    def ids(self) -> tuple[str, ...]:
        """The one it is named after."""
        return (self.id,)

    def check(self, experts: int, chosen: int) -> Iterator[tuple[Path, str]]:
        """The parts make up the whole, and each offers enough."""
        for index, size in enumerate(self.experts):
            if size < max(chosen, 1):
                few = f"{counted(size, 'expert')} {'is' if size == 1 else 'are'}"
                yield ("experts", index), f"{few} fewer than the {chosen} that are chosen"
        if sum(self.experts) != experts:
            yield ("experts",), f"the parts have {sum(self.experts)} experts, the layer {experts}"

    def says(self, setting: Setting) -> Iterator[str]:
        """Which are whose."""
        ends = list(itertools.accumulate(self.experts))
        parts = [
            f"{stop - size}{f' to {stop - 1}' if size > 1 else ''} for id {index}"
            for index, (size, stop) in enumerate(zip(self.experts, ends, strict=True))
        ]
        whose = f"experts of its {named(self.id)}"
        yield f"A token may choose from the {whose} alone: {listed(parts, 'and')}."

    def allowed(self, b: Builder, scores: Any, site: Site) -> Any:
        """Minus infinity outside the id's own experts."""
        parts = len(self.experts)
        own = b.buffer(
            "own_experts",
            *(parts, site.choices),
            make=partition,
            dtype=torch.bool,
            sizes=self.experts,
        )
        return scores.masked_fill(~own[site.ids[self.id]], float("-inf"))
