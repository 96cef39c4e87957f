"""Training policies: what a phase of training trains and how fast, and what holds in it alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from moegen.arch.parts import PARTS, Part, Parts, part_of, spread
from moegen.ops.masking import mask_outputs
from moegen.spec.element import Element, Path
from moegen.spec.words import listed

if TYPE_CHECKING:
    from moegen.arch.setting import Setting
    from moegen.graph.builder import Builder


class Dropout(Element):
    """Rates of dropout, dense branches and experts apart (Switch Transformer section 2.4)."""

    dense: float = Field(0.0, ge=0, lt=1, description="on the output of every branch")
    experts: float = Field(0.0, ge=0, lt=1, description="inside the routed experts")


class Masking(Element):
    """Expert output masking: what experts give is left out at random (NLLB Team 2022).

    A token that loses its experts' outputs is left with the residual stream, and with shared
    experts.
    """

    shorthand = "rate"

    rate: float = Field(gt=0, lt=1, description="the share that is left out in training")
    of: Literal["choices", "tokens", "values"] = Field(
        "choices",
        description="of what: each expert's output for a token; the sum of a token's experts, all "
        "at once (NLLB's final output masking); or single numbers (transformers' NLLB-MoE)",
    )
    scale: Literal["training", "evaluation", "both", "none"] = Field(
        "training",
        description="what makes up for it: 1 / (1 - rate) on what is left in training, or 1 - rate "
        "on everything in evaluation; transformers' NLLB-MoE does both",
    )

    def of_rows(self, b: Builder, rows: Any) -> Any:
        """Experts' outputs [N, d], before they are summed, with some of them 0 if that is asked."""
        return rows if self.of == "tokens" else self._masked(b, rows)

    def of_tokens(self, b: Builder, out: Any) -> Any:
        """Tokens' outputs [T, d] with some of them 0, if that is asked."""
        return self._masked(b, out) if self.of == "tokens" else out

    def _masked(self, b: Builder, out: Any) -> Any:
        left = 1 - self.rate
        options: dict[str, Any] = {}
        if self.of == "values":
            options["values"] = True
        if self.scale in ("training", "both"):
            options["scale"] = 1 / left
        if self.scale in ("evaluation", "both"):
            options["eval_scale"] = left
        return mask_outputs(out, self.rate, b.training, **options)

    def says(self, setting: Setting) -> Iterator[str]:
        """What is left out, and what makes up for it."""
        what = {
            "choices": "each expert's output for a token is",
            "tokens": "all that a token's experts give it is",
            "values": "each number of an expert's output is",
        }
        made_up = {
            "training": f"; what is left is divided by {1 - self.rate:g}",
            "evaluation": f"; in evaluation everything is multiplied by {1 - self.rate:g} instead",
            "both": f"; what is left is divided by {1 - self.rate:g}, by which everything is "
            "multiplied in evaluation",
        }
        masked = f"In training {what[self.of]} left out with probability {self.rate:g}"
        yield f"{masked}{made_up.get(self.scale, '')}."


class Rates(Element):
    """How a part is trained beside the others: factors on what the optimizer is given."""

    shorthand = "lr"

    lr: float = Field(1.0, gt=0, le=1e6, description="factor on the learning rate")
    weight_decay: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="factor on the weight decay; unless said 1 for matrices, 0 for others",
    )
    gradient: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="factor on gradients, before the optimizer and clipping see them; where those "
        "of experts are sums over W devices, 1/W or 1/sqrt(W) (Artetxe et al. 2021)",
    )


class PartRates(Element):
    """Rates by part; those of biases are their part's, but they never decay."""

    embedding: Rates | None = Field(None, description="for embeddings, and a tied head")
    norms: Rates | None = Field(None, description="for norms")
    attention: Rates | None = Field(None, description="for attention")
    dense: Rates | None = Field(None, description="for dense feed-forward networks")
    recurrent: Rates | None = Field(None, description="for recurrent cells")
    router: Rates | None = Field(None, description="for routers")
    experts: Rates | None = Field(None, description="for routed experts")
    shared: Rates | None = Field(None, description="for shared experts")
    head: Rates | None = Field(None, description="for the head")
    other: Rates | None = Field(None, description="for all that is none of these")

    def given(self) -> dict[Part, Rates]:
        """What is said, by part."""
        found = {part: getattr(self, part) for part in PARTS}
        return {part: rates for part, rates in found.items() if rates is not None}


class PhaseCapacity(Element):
    """Other factors of capacity in this phase, in layers that have a capacity."""

    shorthand = "factor"

    factor: float | None = Field(None, gt=0, le=1e6, description="in training; as ever if not said")
    eval_factor: float | Literal["unlimited"] | None = Field(
        None, description="in evaluation; as ever if not said"
    )

    def rules(self) -> Iterator[tuple[Path, str]]:
        """A factor that leaves room."""
        factor = self.eval_factor
        if isinstance(factor, float) and not 0 < factor <= 1e6:
            yield ("eval_factor",), f"eval_factor is {factor:g} but must be above 0"


class Train(Element):
    """What a phase of training trains, and what holds in training only.

    A phase is a spec: one for fine-tuning extends that of the model it starts from, and has this
    section of its own.
    """

    dropout: Dropout = Field(Dropout(), description="rates of dropout")
    masking: Masking | None = Field(None, description="leave out outputs of experts at random")
    freeze: tuple[Parts, ...] = Field(
        (), description="parts that stay as they are; moe stands for router, experts and shared"
    )
    only: tuple[Parts, ...] | None = Field(
        None, min_length=1, description="the only parts that are trained; non_moe: all but moe"
    )
    rates: PartRates = Field(PartRates(), description="learning rate, decay and gradients by part")
    losses: Literal["all", "none"] | tuple[str, ...] = Field(
        "all", description="auxiliary losses of routed layers that are on in this phase, by name"
    )
    capacity: PhaseCapacity | None = Field(None, description="capacity in this phase")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What is frozen is said once, and has no rates."""
        if self.only is not None and self.freeze:
            yield ("freeze",), "only says already what is trained; remove freeze"
        for part in self.rates.given():
            if not self.trains(part):
                yield ("rates", part), f"{part} is frozen, so its rates say nothing; remove them"

    # By role, as parameters have it

    def trains(self, role: str) -> bool:
        """Whether parameters of a role are trained."""
        part = part_of(role)
        if self.only is not None:
            return part in spread(self.only)
        return part not in spread(self.freeze)

    def rates_of(self, role: str) -> Rates:
        """Factors for parameters of a role."""
        return getattr(self.rates, part_of(role)) or Rates()

    def decay(self, role: str, name: str, shape: tuple[int, ...]) -> float:
        """Factor on the weight decay of a parameter; biases, norms and vectors have 0 by default.

        Names of biases end with that word.
        """
        part, said = part_of(role), self.rates_of(role).weight_decay
        if name.endswith("bias") and part != "norms":
            return 0.0
        if said is not None:
            return said
        return 0.0 if part == "norms" or len(shape) < 2 else 1.0

    # Of a whole model

    def broken(self, roles: Iterable[str]) -> Iterator[tuple[Path, str]]:
        """What a model with parameters of these roles cannot do."""
        parts = {part_of(role) for role in roles}
        if parts and not any(map(self.trains, roles)):
            word = "freeze" if self.only is None else "only"
            has = listed(sorted(parts), "and")
            yield (word,), f"nothing is left to train: the model's parameters are {has}"

    def idle(self, roles: Iterable[str]) -> Iterator[tuple[Path, str]]:
        """What says nothing about a model with parameters of these roles."""
        has = {part_of(role) for role in roles}
        for word in ("freeze", "only"):
            for index, named in enumerate(getattr(self, word) or ()):
                if not spread((named,)) & has:
                    yield (word, index), f"the model has no parameters that are {named}"
        for part in self.rates.given():
            if part not in has:
                yield ("rates", part), f"the model has no parameters that are {part}"

    def account(self) -> str:
        """What is trained, in a sentence; nothing if it is all."""
        if self.only is not None:
            return f"Trained: {listed(self.only, 'and')} alone."
        return f"Frozen: {listed(self.freeze, 'and')}." if self.freeze else ""
