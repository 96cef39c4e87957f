"""Recurrent language models: an embedding, recurrent layers with mixtures between, and the head.

Shazeer et al. 2017, "Outrageously Large Neural Networks", appendix C.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.model import Model, RoutedLayer
from moegen.arch.moe import MoE
from moegen.arch.recurrence import LSTM, Recurrence
from moegen.arch.stack import (
    ahead,
    broken_ids,
    given_ids,
    known_ids,
    total_losses,
    unplaced_overrides,
)
from moegen.graph.builder import Builder
from moegen.graph.layer import Layer
from moegen.ops.losses import next_token_loss, real_tokens
from moegen.ops.sampling import sampled_softmax_loss
from moegen.spec.element import Element, OneOf, Path
from moegen.spec.words import counted

Squash = Literal["sigmoid", "none"]


class RecurrentLayer(Layer):
    """A recurrent layer on a residual branch. Made by the model; a spec writes its parts."""

    recurrence: Annotated[Recurrence, OneOf(Recurrence)]

    def class_name(self) -> str:
        """`LSTMLayer`."""
        return f"{type(self.recurrence).__name__}Layer"

    def describe(self, spec: Any) -> str:
        """`LSTM of 512 units, on a residual branch.`"""
        return f"{self.recurrence.sentence(spec.model.d_model)}, on a residual branch."

    def programs(self) -> tuple[str, ...]:
        """Training, and decoding with a state."""
        return ("forward", "step", "new_cache")

    def forward(self, b: Builder, x: Any) -> Any:
        """x [B, S, d] to [B, S, d]."""
        out = b.inline(self.recurrence, "over", x, path=("model", "recurrence"))
        return x + dropped(b, out)

    def step(self, b: Builder, x: Any, state: Any) -> Any:
        """x [B, T, d] to [B, T, d], moving this layer's state."""
        out = b.inline(self.recurrence, "onward", x, state, path=("model", "recurrence"))
        return x + out

    def new_cache(self, b: Builder, batch: Any) -> Any:
        """The state before the first token: the last output and the cells."""
        return b.inline(self.recurrence, "empty", batch, path=("model", "recurrence"))


class MixtureLayer(Layer):
    """A mixture on a residual branch between recurrent layers. Made by the model."""

    moe: MoE
    moe_path: Path = ()
    output: Squash = "sigmoid"

    def describe(self, spec: Any) -> str:
        """`A mixture of experts, through a sigmoid, on a residual branch.`"""
        through = ", through a sigmoid" if self.output == "sigmoid" else ""
        return f"A mixture of experts{through}, on a residual branch."

    def programs(self) -> tuple[str, ...]:
        """Training, decoding, and the balance bias's update."""
        update = ("update_balance",) if self.moe.router.balance_bias else ()
        return ("forward", "step", *update)

    def given(self) -> tuple[str, ...]:
        """Names of the ids that its router reads."""
        return self.moe.given()

    def forward(self, b: Builder, x: Any, valid: Any, **ids: Any) -> Any:
        """x [B, S, d], valid [B * S] and ids [B * S] to [B, S, d] and the routing record."""
        out, routing = self._routed(b, x, valid, *ids.values())
        return x + dropped(b, self._squashed(out)), routing

    def step(self, b: Builder, x: Any, **ids: Any) -> Any:
        """x [B, T, d] to [B, T, d]; there is no state."""
        return x + self._squashed(self._routed(b, x, *ids.values()))

    def update_balance(self, b: Builder, load: Any) -> Any:
        """Pass on to the router."""
        return self._routed(b, load)

    def _squashed(self, out: Any) -> Any:
        return torch.sigmoid(out) if self.output == "sigmoid" else out

    def _routed(self, b: Builder, *inputs: Any) -> Any:
        return b.child("moe", self.moe, *inputs, path=self.moe_path, role="routed_experts")


class RecurrentHead(Element):
    """The softmax layer."""

    tied: bool = Field(False, description="use the embedding's table")
    bias: bool = Field(False, description="whether the logits have a bias")
    sampled: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description="in training, so many words drawn for a loss over them alone; ids are in order "
        "of frequency",
    )


class Recurrent(Model):
    """A language model of recurrent layers with mixtures of experts between them."""

    runtime: ClassVar[str] = "LanguageModel"

    kind: Literal["recurrent"] = "recurrent"
    vocab_size: int = Field(ge=1, le=10**8, description="number of token ids")
    d_model: int = Field(ge=1, le=10**6, description="width of the residual stream")
    layers: int = Field(ge=1, le=2000, description="number of recurrent layers")
    recurrence: Annotated[Recurrence, OneOf(Recurrence)] = Field(
        LSTM(), description="what every recurrent layer is"
    )
    moe: MoE | None = Field(None, description="mixtures between recurrent layers")
    moe_output: Squash = Field(
        "sigmoid", description="what a mixture's output goes through before dropout and residual"
    )
    head: RecurrentHead = Field(RecurrentHead(), description="projection to logits")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What the parts need of the whole."""
        for path, sentence in self.recurrence.check(self.d_model):
            yield ("recurrence", *path), sentence
        if self.head.sampled is not None and self.head.sampled > self.vocab_size:
            words = f"the vocabulary has {self.vocab_size:,}"
            yield ("head", "sampled"), f"{self.head.sampled:,} words are drawn, but {words}"
        if self.moe is None:
            return
        if not self.moe.placement.insert:
            sentence = "mixtures of a recurrent model stand between its layers"
            yield ("moe", "placement"), f"{sentence}; say placement: {{insert: 1}}"
            return
        if self.moe.placement.insert >= self.layers:
            room = f"there is room for {self.layers - 1} between {counted(self.layers, 'layer')}"
            yield ("moe", "placement", "insert"), f"{room}, not for {self.moe.placement.insert}"
            return
        if self.moe.extra:
            sentence = "extra is a branch of attention's blocks"
            yield ("moe", "extra"), f"{sentence}; a recurrent model has none"
        yield from broken_ids(self.routed(), self.vocab_size)
        yield from unplaced_overrides(self.moe, self.routed())

    def programs(self) -> tuple[str, ...]:
        """Training, its loss, decoding and its state, and the balance biases' update."""
        logits = ("logits",) if self.head.sampled else ()
        update = any(one.moe.router.balance_bias for one in self.routed())
        found = ("forward", "loss", *logits, "step", "new_cache")
        return (*found, "update_balance") if update else found

    def describe(self, spec: Any) -> str:
        """`Recurrent model of 2 layers, each LSTM of 512 units, 1 mixture between; ...`"""
        between = len(self.routed())
        mixtures = f", {between} mixture{'s' if between > 1 else ''} between" if between else ""
        each = self.recurrence.sentence(self.d_model)
        layers = f"Recurrent model of {self.layers} layers{mixtures}; each {each}"
        return f"{layers}; {self.d_model} wide, {self.vocab_size} token ids."

    def warnings(self) -> Iterator[tuple[Path, str]]:
        """Routing that looks ahead cannot be had when decoding."""
        yield from ahead(self.routed())

    # Facts

    def given(self) -> tuple[str, ...]:
        """Names of the ids that a user gives beside the tokens', each once."""
        return given_ids(self.routed())

    @property
    def tied(self) -> bool:
        """Whether the head uses the embedding's table."""
        return self.head.tied

    def depth(self, stack: str) -> int:
        """Recurrent layers and mixtures."""
        return len(self.stack())

    def caches(self, cache: Any, sequence: int) -> dict[str, tuple[Any, int]]:
        """A state, which does not grow."""
        return {"state": (cache, 0)}

    def routed(self) -> list[RoutedLayer]:
        """Every mixture, by its place among all layers."""
        if self.moe is None:
            return []
        places = [i for i, recurrent in enumerate(self._order()) if not recurrent]
        return [RoutedLayer(layer, *self.moe.in_layer(layer)) for layer in places]

    def _order(self) -> list[bool]:
        """Whether each layer is recurrent, in the order of the stack."""
        order = [True] * self.layers
        places = self.moe.placement.inserted(self.layers) if self.moe else ()
        for before, place in enumerate(places):
            order.insert(place + before, False)  # never two of them in a row
        return order

    def stack(self) -> list[RecurrentLayer | MixtureLayer]:
        """All layers, equal ones being equal elements."""
        routed = {one.layer: one for one in self.routed()}
        made: list[RecurrentLayer | MixtureLayer] = []
        for layer in range(self.layers + len(routed)):
            if layer in routed:
                moe, path = routed[layer].moe, routed[layer].path
                made.append(MixtureLayer(moe=moe, moe_path=path, output=self.moe_output))
            else:
                made.append(RecurrentLayer(recurrence=self.recurrence))
        return made

    def examples(self, batch: Any, sequence: Any, new: int = 1) -> dict[str, Any]:
        """Inputs of each program, in the order to run them; a function of results so far."""

        def tokens(*shape: Any) -> Any:
            return torch.zeros(shape, dtype=torch.int64)

        def given() -> list[Any]:
            return [tokens(batch) for _ in self.given()]

        return {
            "new_cache": lambda done: (batch, sequence),
            "step": lambda done: (tokens(batch, new), tokens(), done["new_cache"], *given()),
            "forward": lambda done: (tokens(batch, sequence), None, *given()),
            "loss": lambda done: (done["forward"][0], tokens(batch, sequence)),
            "logits": lambda done: (done["forward"][0],),
            "update_balance": lambda done: (done["forward"].routing,),
        }

    # Programs

    def forward(self, b: Builder, ids: Any, mask: Any = None, **given: Any) -> Any:
        """ids [B, S], and mask [B, S] of real tokens (padding on the right), to an Output."""
        x = dropped(b, self._embed(b, ids))
        valid, known = None, {}
        if self.moe:
            valid = real_tokens(ids, mask)
            known = known_ids(b, self.routed(), ids, given)
        routing = []
        for layer, element in enumerate(self.stack()):
            if isinstance(element, RecurrentLayer):
                x = self._recurrent(b, layer, element, x)
            else:
                more = [known[name] for name in element.given()]
                x, record = b.child(f"layers.{layer}", element, x, valid, *more)
                routing.append(record)
        fields = {"hidden": x} if self.head.sampled else {"logits": self._logits(b, x)}
        if self.moe:
            records = tuple(routing)
            fields |= {"losses": total_losses(b, self.moe, records), "routing": records}
        return b.record("Output", **fields)

    def loss(self, b: Builder, logits: Any, labels: Any) -> Any:
        """Mean cross-entropy of the next token, from what an Output holds first."""
        if self.head.sampled is None:
            return next_token_loss(logits, labels)
        return sampled_softmax_loss(
            logits, self._table(b), self._bias(b), labels, self.head.sampled, b.training
        )

    def logits(self, b: Builder, hidden: Any) -> Any:
        """Logits [B, S, V] of an Output's vectors [B, S, d]."""
        return self._logits(b, hidden)

    def step(self, b: Builder, ids: Any, start: Any, cache: Any, **given: Any) -> Any:
        """ids [B, T] after those that the state has seen, to logits [B, T, V]; moves the state."""
        x = self._embed(b, ids)
        known = known_ids(b, self.routed(), ids, given)
        states = iter(range(self.layers))
        for layer, element in enumerate(self.stack()):
            if isinstance(element, RecurrentLayer):
                x = self._recurrent(b, layer, element, x, cache[next(states)])
            else:
                more = [known[name] for name in element.given()]
                x = b.child(f"layers.{layer}", element, x, *more)
        return self._logits(b, x)

    def new_cache(self, b: Builder, batch: Any, length: Any) -> Any:
        """Every recurrent layer's state before the first token of `batch` sequences."""
        return tuple(
            self._recurrent(b, layer, element, batch)
            for layer, element in enumerate(self.stack())
            if isinstance(element, RecurrentLayer)
        )

    def update_balance(self, b: Builder, routing: Any) -> Any:
        """Move the routers' balance biases by the loads of a step's Output.routing."""
        stack = self.stack()
        for index, one in enumerate(self.routed()):
            if one.moe.router.balance_bias:
                b.child(one.site, stack[one.layer], routing[index].load)

    # Parts

    def _recurrent(self, b: Builder, layer: int, element: Layer, *inputs: Any) -> Any:
        path = ("model", "recurrence")
        return b.child(f"layers.{layer}", element, *inputs, path=path, role="recurrent")

    def _embed(self, b: Builder, ids: Any) -> Any:
        table = b.param("embedding", self.vocab_size, self.d_model, role="embedding")
        return F.embedding(ids, table)

    def _table(self, b: Builder) -> Any:
        name = "embedding" if self.head.tied else "head"
        return b.param(name, self.vocab_size, self.d_model, role=name)

    def _bias(self, b: Builder) -> Any:
        return b.param("head_bias", self.vocab_size, role="head") if self.head.bias else None

    def _logits(self, b: Builder, x: Any) -> Any:
        return F.linear(x, self._table(b), self._bias(b))


def dropped(b: Builder, x: Any) -> Any:
    """A layer's output with dropout, if there is any."""
    rate = b.spec.train.dropout.dense
    return F.dropout(x, rate, b.training) if rate else x
