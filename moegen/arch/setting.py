"""Settings: where a part of a routed layer stands when it says what it does, with numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from moegen.spec.words import counted, listed

if TYPE_CHECKING:
    from moegen.arch.moe import MoE


@dataclass(frozen=True)
class Setting:
    """A routed layer of a spec, and the batch that its numbers are for.

    inside: for a router inside experts, the mixture that it routes to.
    """

    spec: Any
    moe: MoE
    batch: int
    sequence: int
    inside: Any = None

    def within(self, mixture: Any) -> Setting:
        """The setting of a router inside this layer's experts."""
        return replace(self, inside=mixture)

    @property
    def mixture(self) -> Any:
        """What the router routes to: the layer, or what is inside an expert."""
        return self.inside or self.moe

    @property
    def router(self) -> Any:
        """The router whose parts speak."""
        return self.mixture.router

    @property
    def choices(self) -> int:
        """Experts that can be chosen, those without parameters included."""
        return int(self.mixture.num_choices)

    @property
    def chosen(self) -> int:
        """k: experts that a token takes; 0 where tokens do not choose."""
        return int(self.router.select.chosen(self.mixture.granularity, self.choices))

    @property
    def width(self) -> int:
        """d: width of a token."""
        return int(self.spec.model.d_model)

    @property
    def routed_layers(self) -> int:
        """Routed layers of the model."""
        return len(self.spec.model.routed())

    @property
    def stacks(self) -> int:
        """Stacks of the model that have routed layers."""
        return len({one.stack for one in self.spec.model.routed()})

    # Words

    @property
    def whole(self) -> str:
        """What tokens are of: a sequence, or an image."""
        return str(self.spec.model.whole)

    @property
    def afterwards(self) -> str:
        """What is not training, as far as the model does it."""
        decodes = "step" in self.spec.model.programs()
        return "evaluation and decoding" if decodes else "evaluation"

    def either(self, training: str, evaluation: str) -> str:
        """What holds in training and what in evaluation, as decoding; once if it is one."""
        if training == evaluation:
            return training
        return f"in training {training}; in {self.afterwards} {evaluation}"

    @property
    def noun(self) -> str:
        """What is chosen."""
        return "inner expert" if self.inside else "expert"

    @property
    def experts(self) -> str:
        """All that can be chosen: `8 experts`."""
        return counted(self.choices, self.noun)

    @property
    def logits(self) -> str:
        """What has a logit each: `8 experts`, or `16 slots`."""
        size = self.router.select.logits(self.choices)
        return self.experts if size == self.choices else counted(size, "slot")

    @property
    def ranked(self) -> str:
        """What selection goes by."""
        noise = self.router.noise
        noisy = "noisy " if noise and noise.selection_only else ""
        what = "logits" if self.router.select.by_logits else "scores"
        return f"{noisy}{'biased ' if self.router.balance_bias else ''}{what}"

    @property
    def competing(self) -> str:
        """The tokens that are set against each other."""
        size = f"{self.group:,} tokens"
        of = {"sequence": f"the {size} of each {self.whole}", "run": f"each run of {size}"}
        return of.get(self.moe.group_kind, f"the {size} of the batch")

    # Numbers: as the programs come by them, on numbers in place of proxies

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.sequence

    @property
    def group(self) -> int:
        """Tokens that compete with each other."""
        return self.tokens if self._group is None else int(self._group)

    @property
    def _group(self) -> Any:
        x = torch.empty(self.batch, self.sequence, 1, device="meta")
        return self.moe._group(x, x.flatten(0, 1))

    def room(self, *, training: bool) -> int:
        """Slots of each expert, or of each device's experts, under this layer's capacity."""
        assert self.moe.capacity is not None
        tokens = torch.empty(self.tokens, 1, device="meta")
        scored: Any = SimpleNamespace(tokens=tokens, site=SimpleNamespace(group=self._group))
        b: Any = SimpleNamespace(training=training)
        return int(self.moe.capacity.room(b, scored, self.chosen, self.moe.num_experts))


def sentence(parts: list[str], join: str = "and") -> str:
    """Phrases as one sentence, with a capital and a full stop."""
    text = listed(parts, join)
    return f"{text[:1].upper()}{text[1:]}."
