"""Decoder-only language models: embedding, a stack of blocks, and the head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.attention import Attention
from moegen.arch.block import Block
from moegen.arch.feed_forward import FeedForward
from moegen.arch.model import LONGEST, Model, RoutedLayer
from moegen.arch.moe import MoE
from moegen.arch.norm import Norm, RMSNorm
from moegen.arch.rope import Rope
from moegen.arch.stack import (
    Stack,
    ahead,
    broken_ids,
    given_ids,
    known_ids,
    total_losses,
    unplaced_overrides,
)
from moegen.graph.builder import Builder
from moegen.ops.losses import next_token_loss, output_z_loss, real_tokens
from moegen.spec.element import Element, OneOf, Path


class Embedding(Element):
    """The table of token vectors."""

    scale: float | Literal["sqrt_d_model"] = Field(1.0, description="factor on its vectors")

    def factor(self, d_model: int) -> float:
        """The factor as a number."""
        return math.sqrt(d_model) if self.scale == "sqrt_d_model" else float(self.scale)


class Head(Element):
    """The projection from the last layer to logits."""

    tied: bool = Field(False, description="use the embedding's table")
    bias: bool = Field(False, description="whether the logits have a bias")
    scale: Annotated[float, Field(gt=0, le=1e6)] | Literal["rsqrt_d_model"] = Field(
        1.0, description="factor on the logits; rsqrt_d_model: d_model^-1/2 (T5)"
    )
    softcap: float | None = Field(None, gt=0, description="bound: cap * tanh(logits / cap)")
    z_loss: float = Field(
        0.0, ge=0, le=1e6, description="coefficient of mean LSE(logits)^2 (GLaM, PaLM)"
    )

    def logits(self, b: Builder, x: Any, vocabulary: int) -> Any:
        """x [..., d] to logits [..., V], with the table of the model that calls this."""
        if self.tied:
            table = b.param("embedding", vocabulary, b.width, role="embedding")
        else:
            table = b.param("head", vocabulary, b.width, role="head")
        bias = None
        if self.bias:
            bias = b.param("head_bias", vocabulary, role="head")
        logits = F.linear(x, table, bias)
        scale = self.factor(b.width)
        if scale != 1.0:
            logits = logits * scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def factor(self, d_model: int) -> float:
        """The factor as a number."""
        return d_model**-0.5 if self.scale == "rsqrt_d_model" else float(self.scale)


class Decoder(Model):
    """A causal language model."""

    runtime: ClassVar[str] = "LanguageModel"

    kind: Literal["decoder"] = "decoder"
    vocab_size: int = Field(ge=1, le=10**8, description="number of token ids")
    d_model: int = Field(ge=1, le=10**6, description="width of the residual stream")
    layers: int = Field(ge=1, le=2000, description="number of blocks")
    embedding: Embedding = Field(Embedding(), description="token embedding")
    norm: Annotated[Norm, OneOf(Norm)] = Field(
        RMSNorm(), description="normalisation of blocks and before head"
    )
    attention: Annotated[Attention, OneOf(Attention)] = Field(
        description="attention of every block"
    )
    ffn: FeedForward | None = Field(None, description="network of the layers not routed")
    moe: MoE | None = Field(None, description="mixture of experts of the routed layers")
    residual_scale: float = Field(1.0, gt=0, le=1e3, description="factor on every branch")
    head: Head = Field(Head(), description="projection to logits")
    max_sequence: int = Field(4096, ge=1, le=10**9, description="longest sequence to serve")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What the parts need of the whole."""
        if not self.attention.causal:
            kind = self.attention.kind
            yield ("attention", "kind"), f"{kind} attention sees later tokens; a decoder needs gqa"
        yield from self.stack().rules()
        if self.moe is None:
            return
        yield from broken_ids(self.routed(), self.vocab_size)
        yield from unplaced_overrides(self.moe, self.routed())

    def programs(self) -> tuple[str, ...]:
        """Training, its loss, decoding and its cache, and the balance biases' update."""
        update = self.moe and any(one.moe.router.balance_bias for one in self.routed())
        return ("forward", "loss", "step", "new_cache", *(("update_balance",) if update else ()))

    def describe(self, spec: Any) -> str:
        """`Decoder of 61 layers, 7168 wide, 129280 token ids.`"""
        routed = len(self.routed())
        part = f", {routed} of them routed" if 0 < routed < self.layers else ""
        layers = f"{self.layers} layers{part}"
        return f"Decoder of {layers}; {self.d_model} wide, {self.vocab_size} token ids."

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

    def stack(self) -> Stack:
        """The blocks."""
        placement = self.moe.placement if self.moe else None
        return Stack(self, self.layers, self.attention, placement)

    def routed(self) -> list[RoutedLayer]:
        """Every routed layer, inserted ones counted."""
        return self.stack().routed()

    def depth(self, stack: str) -> int:
        """Layers of the one stack that it has."""
        return len(self.stack().blocks())

    def length(self, asked: int | None) -> int:
        """As many tokens as it is made to serve, at most 4,096, unless asked for."""
        return asked or min(LONGEST, self.max_sequence)

    def ropes(self) -> list[Rope]:
        """The distinct rotary embeddings of the stack, in order of first use."""
        found: list[Rope] = []
        for block in self.stack().blocks():
            rope = block.attention.rope if isinstance(block, Block) else None
            if rope is not None and rope not in found:
                found.append(rope)
        return found

    def rotary(self, rope: Rope, context: Any) -> tuple[Any, Any]:
        """cos and sin of a rotary embedding, from the context."""
        suffix = self._suffix(self.ropes().index(rope))
        return getattr(context, f"cos{suffix}"), getattr(context, f"sin{suffix}")

    def examples(self, batch: Any, sequence: Any, new: int = 1) -> dict[str, Any]:
        """Inputs of each program, in the order to run them; a function of results so far.

        Parts that decoding and training share keep the shapes of the last: training's.
        `new` tokens are decoded against a cache of `sequence` positions.
        """

        def tokens(*shape: Any) -> Any:
            return torch.zeros(shape, dtype=torch.int64)

        def given() -> list[Any]:
            return [tokens(batch) for _ in self.given()]

        return {
            "new_cache": lambda done: (batch, sequence),
            "step": lambda done: (tokens(batch, new), tokens(), done["new_cache"], *given()),
            "forward": lambda done: (tokens(batch, sequence), None, *given()),
            "loss": lambda done: (done["forward"].logits, tokens(batch, sequence)),
            "update_balance": lambda done: (done["forward"].routing,),
        }

    # Programs

    def forward(self, b: Builder, ids: Any, mask: Any = None, **given: Any) -> Any:
        """ids [B, S], and mask [B, S] of real tokens (padding on the right), to an Output."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        fields = self._tables(b, positions)
        valid = None
        if self.moe or self.head.z_loss:
            valid = real_tokens(ids, mask)
        if self.moe:
            fields |= {"valid": valid, **known_ids(b, self.routed(), ids, given)}
        context = b.record("Context", **fields)
        x = self._embed(b, ids)
        if not self.moe:
            for layer, block in enumerate(self.stack().blocks()):
                x = b.child(f"layers.{layer}", block, x, context)
            return self._output(b, self._logits(b, x), valid)
        routing = b.no_items()
        for layer, block in enumerate(self.stack().blocks()):
            x, records = b.child(f"layers.{layer}", block, x, context)
            routing = routing + records
        logits = self._logits(b, x)
        return self._output(
            b, logits, valid, losses=total_losses(b, self.moe, routing), routing=routing
        )

    def loss(self, b: Builder, logits: Any, labels: Any) -> Any:
        """Mean cross-entropy of the next token."""
        return next_token_loss(logits, labels)

    def step(self, b: Builder, ids: Any, start: Any, cache: Any, **given: Any) -> Any:
        """ids [B, T] at positions start, start + 1, ... to logits [B, T, V]; fills the cache."""
        positions = start + torch.arange(ids.shape[1], device=ids.device)
        tables = self._tables(b, positions)
        known = known_ids(b, self.routed(), ids, given)
        context = b.record("Place", start=start, positions=positions, **tables, **known)
        x = self._embed(b, ids)
        for layer, block in enumerate(self.stack().blocks()):
            x = b.child(f"layers.{layer}", block, x, context, cache[layer])
        return self._logits(b, x)

    def new_cache(self, b: Builder, batch: Any, length: Any) -> Any:
        """An empty cache for `batch` sequences of up to `length` tokens."""
        return tuple(
            b.child(f"layers.{layer}", block, batch, length)
            for layer, block in enumerate(self.stack().blocks())
        )

    def update_balance(self, b: Builder, routing: Any) -> Any:
        """Move the routers' balance biases by the loads of a step's Output.routing."""
        blocks = self.stack().blocks()
        for index, one in enumerate(self.routed()):
            if one.moe.router.balance_bias:
                b.child(one.site, blocks[one.layer], routing[index].load)

    # Parts

    def _output(self, b: Builder, logits: Any, valid: Any, **fields: Any) -> Any:
        """The record, with the loss on logits among the others if there is one."""
        if self.head.z_loss:
            output_z = output_z_loss(logits, valid)
            losses = fields.pop("losses", {})
            fields = {"losses": {**losses, "output_z": output_z * self.head.z_loss}, **fields}
        return b.record("Output", logits=logits, **fields)

    def _suffix(self, index: int) -> str:
        return f"_{index + 1}" if index else ""

    def _tables(self, b: Builder, positions: Any) -> dict[str, Any]:
        """cos and sin of every rotary embedding."""
        fields: dict[str, Any] = {}
        for index, rope in enumerate(self.ropes()):
            suffix = self._suffix(index)
            width = rope.dim or self.attention.rope_width(self.d_model)
            name = f"frequencies{suffix}"
            path = ("attention", "rope")
            cos, sin = b.inline(rope, "tables", name, width, positions, path=path)
            fields |= {f"cos{suffix}": cos, f"sin{suffix}": sin}
        return fields

    def _embed(self, b: Builder, ids: Any) -> Any:
        table = b.param("embedding", self.vocab_size, self.d_model, role="embedding")
        x = F.embedding(ids, table)
        factor = self.embedding.factor(self.d_model)
        return x if factor == 1.0 else x * factor

    def _logits(self, b: Builder, x: Any) -> Any:
        x = b.inline(self.norm, "apply", "norm", x, self.d_model, path=("norm",))
        return self.head.logits(b, x, self.vocab_size)
