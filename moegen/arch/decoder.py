"""Decoder-only language models: embedding, a stack of blocks, and the head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.attention import Attention
from moegen.arch.block import Block, InsertedBlock
from moegen.arch.feed_forward import FeedForward
from moegen.arch.mixture_rules import SILENCE, leaks, of_ids
from moegen.arch.model import Model
from moegen.arch.moe import MoE
from moegen.arch.norm import Norm, RMSNorm
from moegen.arch.rope import Rope
from moegen.arch.routing.ids import TOKEN
from moegen.graph.builder import Builder
from moegen.ops.losses import next_token_loss, output_z_loss, real_tokens
from moegen.ops.sequences import per_token
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
    scale: float = Field(1.0, gt=0, le=1e6, description="factor on the logits")
    softcap: float | None = Field(None, gt=0, description="bound: cap * tanh(logits / cap)")
    z_loss: float = Field(
        0.0, ge=0, le=1e6, description="coefficient of mean LSE(logits)^2 (GLaM, PaLM)"
    )


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

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What the parts need of the whole."""
        for path, sentence in self.attention.check(self.d_model):
            yield ("attention", *path), sentence
        if self.attention.window:
            for path, sentence in self.attention.window.placement.outside(self.layers):
                yield ("attention", "window", "placement", *path), sentence
        if self.moe is None:
            if self.ffn is None:
                yield (), "a model needs ffn, moe, or both"
            return
        for path, sentence in self.moe.placement.outside(self.layers):
            yield ("moe", "placement", *path), sentence
        own = set(self.moe.placement.of(self.layers))
        if self.ffn is None and len(own) < self.layers:
            dense = next(i for i in range(self.layers) if i not in own)
            yield ("moe", "placement"), f"layer {dense} is not routed, so the model needs ffn too"
        routed = self._routed_layers()
        yield from dict.fromkeys(
            ((*path[1:], *below), sentence)
            for _, moe, path in self.routed()
            for below, sentence in of_ids(moe, self.vocab_size)
        )
        for index, override in enumerate(self.moe.overrides):
            for place, layer in enumerate(override.layers):
                if layer not in routed:
                    path = ("moe", "overrides", index, "layers", place)
                    yield path, f"layer {layer} is not a routed layer"

    def programs(self) -> tuple[str, ...]:
        """Training, its loss, decoding and its cache, and the balance biases' update."""
        update = self.moe and any(m.router.balance_bias for _, m, _ in self.routed())
        return ("forward", "loss", "step", "new_cache", *(("update_balance",) if update else ()))

    def describe(self, spec: Any) -> str:
        """`Decoder of 61 layers, 7168 wide, 129280 token ids.`"""
        routed = len(self.routed())
        part = f", {routed} of them routed" if 0 < routed < self.layers else ""
        layers = f"{self.layers} layers{part}"
        return f"Decoder of {layers}; {self.d_model} wide, {self.vocab_size} token ids."

    def class_name(self) -> str:
        """What users import."""
        return "Model"

    def warnings(self) -> Iterator[tuple[Path, str]]:
        """Routing that looks ahead cannot be had when decoding."""
        told: set[str] = set()
        for _, moe, path in self.routed():
            if moe.non_causal == "accept":
                continue
            for below, sentence in leaks(moe):
                if sentence not in told:
                    told.add(sentence)
                    yield (*path[1:], *below), f"{sentence}; {SILENCE}"

    # Facts

    def given(self) -> tuple[str, ...]:
        """Names of the ids that a user gives beside the tokens', each once."""
        names = [name for _, moe, _ in self.routed() for name in moe.given()]
        return tuple(name for name in dict.fromkeys(names) if name != TOKEN)

    @property
    def tied(self) -> bool:
        """Whether the head uses the embedding's table."""
        return self.head.tied

    def routed(self) -> list[tuple[int, MoE, Path]]:
        """Every routed layer with its MoE and the place in the spec that says it."""
        if self.moe is None:
            return []
        return [(layer, *self.moe.in_layer(layer)) for layer in self._routed_layers()]

    def _routed_layers(self) -> tuple[int, ...]:
        """Where mixtures stand in the stack, inserted ones counted."""
        assert self.moe is not None
        placement = self.moe.placement
        if not placement.insert:
            return placement.of(self.layers)
        stack = self._with_extra(list(range(self.layers)), [None] * placement.insert)
        return tuple(i for i, layer in enumerate(stack) if layer is None)

    def _with_extra(self, own: list[Any], extra: list[Any]) -> list[Any]:
        """The stack's own layers with the extra ones where the placement inserts them."""
        assert self.moe is not None
        for index, layer in zip(self.moe.placement.inserted(self.layers), extra, strict=True):
            own.insert(index, layer)
        return own

    def blocks(self) -> list[Block | InsertedBlock]:
        """The stack, equal blocks being equal elements."""
        routed = {layer: (moe, path) for layer, moe, path in self.routed()}
        common = {
            "norm": self.norm,
            "routing": bool(routed),
            "residual_scale": self.residual_scale,
        }
        made: dict[Any, Block] = {}
        stack: list[Block | InsertedBlock] = []
        if self.moe and self.moe.placement.insert:
            extra = [
                InsertedBlock(
                    norm=self.norm, moe=moe, moe_path=path, residual_scale=self.residual_scale
                )
                for moe, path in routed.values()
            ]
            routed = {}
        for layer in range(self.layers):
            moe, path = routed.get(layer, (None, ()))
            attention = self.attention.in_layer(layer, self.layers)
            key = (path, bool(attention.window), moe is None)
            if key not in made:
                ffn = None if moe else self.ffn
                made[key] = Block(attention=attention, ffn=ffn, moe=moe, moe_path=path, **common)
            stack.append(made[key])
        if self.moe and self.moe.placement.insert:
            return self._with_extra(stack, extra)
        return stack

    def ropes(self) -> list[Rope]:
        """The distinct rotary embeddings of the stack, in order of first use."""
        found: list[Rope] = []
        for block in self.blocks():
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
            fields |= {"valid": valid, **self._ids(b, ids, given)}
        context = b.record("Context", **fields)
        x = self._embed(b, ids)
        if not self.moe:
            for layer, block in enumerate(self.blocks()):
                x = b.child(f"layers.{layer}", block, x, context)
            return self._output(b, self._logits(b, x), valid)
        routing = b.no_items()
        for layer, block in enumerate(self.blocks()):
            x, records = b.child(f"layers.{layer}", block, x, context)
            routing = routing + records
        logits = self._logits(b, x)
        return self._output(b, logits, valid, losses=self._losses(b, routing), routing=routing)

    def loss(self, b: Builder, logits: Any, labels: Any) -> Any:
        """Mean cross-entropy of the next token."""
        return next_token_loss(logits, labels)

    def step(self, b: Builder, ids: Any, start: Any, cache: Any, **given: Any) -> Any:
        """ids [B, T] at positions start, start + 1, ... to logits [B, T, V]; fills the cache."""
        positions = start + torch.arange(ids.shape[1], device=ids.device)
        tables = self._tables(b, positions)
        known = self._ids(b, ids, given)
        context = b.record("Place", start=start, positions=positions, **tables, **known)
        x = self._embed(b, ids)
        for layer, block in enumerate(self.blocks()):
            x = b.child(f"layers.{layer}", block, x, context, cache[layer])
        return self._logits(b, x)

    def new_cache(self, b: Builder, batch: Any, length: Any) -> Any:
        """An empty cache for `batch` sequences of up to `length` tokens."""
        return tuple(
            b.child(f"layers.{layer}", block, batch, length)
            for layer, block in enumerate(self.blocks())
        )

    def update_balance(self, b: Builder, routing: Any) -> Any:
        """Move the routers' balance biases by the loads of a step's Output.routing."""
        blocks = self.blocks()
        for index, (layer, moe, _) in enumerate(self.routed()):
            if moe.router.balance_bias:
                b.child(f"layers.{layer}", blocks[layer], routing[index].load)

    # Parts

    def _output(self, b: Builder, logits: Any, valid: Any, **fields: Any) -> Any:
        """The record, with the loss on logits among the others if there is one."""
        if self.head.z_loss:
            output_z = output_z_loss(logits, valid)
            losses = fields.pop("losses", {})
            fields = {"losses": {**losses, "output_z": output_z * self.head.z_loss}, **fields}
        return b.record("Output", logits=logits, **fields)

    def _ids(self, b: Builder, ids: Any, given: dict[str, Any]) -> dict[str, Any]:
        """What routers read beside tokens, one for every token."""
        names = dict.fromkeys(name for _, moe, _ in self.routed() for name in moe.given())
        known = {}
        for name in names:
            if name == TOKEN:
                known[name] = ids.flatten()
            else:
                known[name] = b.name(per_token(given[name], ids.shape[0], ids.shape[1]), name)
        return known

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
        if self.head.tied:
            table = b.param("embedding", self.vocab_size, self.d_model, role="embedding")
        else:
            table = b.param("head", self.vocab_size, self.d_model, role="head")
        bias = None
        if self.head.bias:
            bias = b.param("head_bias", self.vocab_size, role="head")
        logits = F.linear(x, table, bias)
        if self.head.scale != 1.0:
            logits = logits * self.head.scale
        if self.head.softcap:
            logits = self.head.softcap * torch.tanh(logits / self.head.softcap)
        return logits

    def _losses(self, b: Builder, routing: Any) -> dict[str, Any]:
        """Every auxiliary loss over all layers, weighted, ready to be added."""
        assert self.moe is not None
        return {
            name: loss.over_layers(b, name, routing, self.moe.chosen) * loss.weight
            for name, loss in self.moe.losses.items()
        }
