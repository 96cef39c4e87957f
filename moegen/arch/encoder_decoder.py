"""Encoder-decoders: a stack that reads a sequence, and one that writes another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.attention import Attention, GroupedQueryAttention
from moegen.arch.cross_attention import CrossBlock
from moegen.arch.decoder import Embedding, Head
from moegen.arch.feed_forward import FeedForward
from moegen.arch.model import RoutedLayer
from moegen.arch.moe import MoE
from moegen.arch.norm import Norm, RMSNorm
from moegen.arch.positions import Relative, SequencePositions, Sinusoidal
from moegen.arch.rope import Rope
from moegen.arch.sequence_pair import SequencePair
from moegen.arch.sequence_records import RECORDS
from moegen.arch.sequence_stacks import (
    DecoderStack,
    EncoderStack,
    SequenceStack,
    StackOf,
    across,
    within,
)
from moegen.arch.stack import Stack, ahead, broken_ids, given_ids, known_ids, total_losses
from moegen.graph.builder import Builder
from moegen.ops.biased_attention import padding_bias
from moegen.ops.losses import output_z_loss, real_tokens
from moegen.ops.sequence_loss import label_loss, shift_right
from moegen.spec.element import OneOf, Path


class EncoderDecoder(SequencePair):
    """A model that reads one sequence and writes another (Vaswani et al. 2017; T5, 2020)."""

    runtime: ClassVar[str] = "SequenceToSequence"
    records: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = RECORDS

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    vocab_size: int = Field(ge=1, le=10**8, description="number of token ids, of both sequences")
    d_model: int = Field(ge=1, le=10**6, description="width of the residual streams")
    encoder: StackOf = Field(description="the stack that reads")
    decoder: StackOf = Field(description="the stack that writes")
    embedding: Embedding = Field(Embedding(), description="token embedding of both")
    positions: Annotated[SequencePositions | None, OneOf(SequencePositions, optional=True)] = Field(
        Relative(), description="how both know where a token stands; none: rope or nothing"
    )
    norm: Annotated[Norm, OneOf(Norm)] = Field(
        RMSNorm(), description="normalisation of blocks and after each stack"
    )
    attention: Annotated[Attention, OneOf(Attention)] = Field(
        description="attention in and between the stacks; without rope unless said"
    )
    ffn: FeedForward | None = Field(None, description="network of the layers not routed")
    moe: MoE | None = Field(None, description="mixture of experts of the routed layers")
    residual_scale: float = Field(1.0, gt=0, le=1e3, description="factor on every branch")
    head: Head = Field(Head(), description="projection to logits")
    start_token: int = Field(0, ge=0, description="id that every target begins behind")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What the parts need of the whole."""
        attention = self.attention
        if type(attention) is not GroupedQueryAttention:
            yield ("attention", "kind"), f"encoder-decoders have no {attention.kind}; say kind: gqa"
            return
        for name in _DECODERS_ALONE:
            if getattr(attention, name, None) not in (None, False, "none"):
                yield ("attention", name), f"{name} is for decoders alone; remove it"
        said = attention.rope if "rope" in attention.model_fields_set else None
        if said and self.positions:
            kind = self.positions.kind
            yield ("attention", "rope"), f"positions are {kind}; say positions: none, or no rope"
        for path, sentence in self.positions.check(self.d_model) if self.positions else ():
            yield ("positions", *path), sentence
        if self.start_token >= self.vocab_size:
            sentence = f"start_token is {self.start_token} but ids end at {self.vocab_size - 1}"
            yield ("start_token",), sentence
        yield from self._broken_stacks()
        if self.moe is not None:
            yield from broken_ids(self.routed(), self.vocab_size)

    def _broken_stacks(self) -> Iterator[tuple[Path, str]]:
        """Each stack by itself, and mixtures that no layer has."""
        found = [problem for stack in self.stacks().values() for problem in self._broken(stack)]
        yield from dict.fromkeys(found)
        for name in ("encoder", "decoder"):
            if self.moe is None and getattr(self, name).placement is not None:
                yield (name, "placement"), "there is no moe to place; add one, or remove placement"
        if self.moe is None:
            return
        if not self.routed() and not found:
            yield ("moe",), "no layer of either stack is routed; remove moe, or place it"
        if self.moe.overrides:
            sentence = "layers are of two stacks here, so overrides do not tell whose; remove them"
            yield ("moe", "overrides"), sentence

    @staticmethod
    def _broken(stack: Stack) -> Iterator[tuple[Path, str]]:
        if stack.placement is not None and stack.placement.insert:
            yield (*stack.said_at, "insert"), "insert is for decoders alone; choose layers instead"
            return
        yield from stack.rules()

    def programs(self) -> tuple[str, ...]:
        """Training, its loss, reading a source, decoding, and the balance biases' update."""
        update = any(one.moe.router.balance_bias for one in self.routed())
        decoding = ("encode", "new_cache", "step", "shifted")
        return ("forward", "loss", *decoding, *(("update_balance",) if update else ()))

    def describe(self, spec: Any) -> str:
        """`Encoder of 12 layers, decoder of 12, 12 of them routed; 768 wide, 32128 token ids.`"""
        routed = len(self.routed())
        part = f", {routed} of them routed" if routed else ""
        layers = f"Encoder of {self.encoder.layers} layers, decoder of {self.decoder.layers}{part}"
        return f"{layers}; {self.d_model} wide, {self.vocab_size} token ids."

    def warnings(self) -> Iterator[tuple[Path, str]]:
        """Routing that looks ahead cannot be had when decoding; an encoder sees all anyway."""
        yield from ahead(self.stacks()["decoder"].routed())

    # Facts

    @property
    def tied(self) -> bool:
        """Whether the head uses the embedding's table."""
        return self.head.tied

    def stacks(self) -> dict[str, Stack]:
        """The blocks of both, by name."""
        assert isinstance(self.attention, GroupedQueryAttention)
        cross = partial(CrossBlock, cross=across(self.attention))
        return {
            "encoder": self._stack("encoder", self.encoder),
            "decoder": self._stack("decoder", self.decoder, block=cross),
        }

    def _stack(self, name: str, of: StackOf, **block: Any) -> Stack:
        assert isinstance(self.attention, GroupedQueryAttention)
        attention = within(self.attention, self.positions, encoder=name == "encoder")
        placement = of.placement
        said_at: Path = (name, "placement")
        if placement is None:
            placement = self.moe.placement if self.moe else None
            said_at = ("moe", "placement")
        if placement == "none" or self.moe is None:
            placement = None
        return Stack(self, of.layers, attention, placement, said_at, name, **block)

    def routed(self) -> list[RoutedLayer]:
        """Every routed layer, the encoder's first."""
        return [one for stack in self.stacks().values() for one in stack.routed()]

    def depth(self, stack: str) -> int:
        """Layers of the encoder or of the decoder."""
        return len(self.stacks()[stack].blocks())

    def given(self) -> tuple[str, ...]:
        """Names of the ids that a user gives beside the tokens', each once."""
        return given_ids(self.routed())

    def rotary(self, rope: Rope, context: Any) -> tuple[Any, Any]:
        """cos and sin of the rotary embedding, from the context."""
        return context.cos, context.sin

    # Programs

    def forward(
        self,
        b: Builder,
        ids: Any,
        decoder_ids: Any,
        mask: Any = None,
        decoder_mask: Any = None,
        **given: Any,
    ) -> Any:
        """Source ids [B, S] and target ids [B, T] to an Output; masks tell real tokens."""
        hidden = padding_bias(ids, mask, b.spec.precision.compute_dtype)
        memory, routing = self._read(b, ids, mask, hidden, given)
        x = self._embed(b, decoder_ids, torch.arange(decoder_ids.shape[1], device=ids.device))
        stack = self._layer("decoder")
        valid = None
        if stack.routed or self.head.z_loss:
            valid = real_tokens(decoder_ids, decoder_mask)
        known = known_ids(b, self.stacks()["decoder"].routed(), decoder_ids, given)
        inputs = (x, memory, hidden, valid if stack.routed else None, *known.values())
        if stack.routed:
            x, decoder_routing = b.child("decoder", stack, *inputs)
        else:
            x = b.child("decoder", stack, *inputs)
            decoder_routing = None
        return self._output(b, self._logits(b, x), valid, routing, decoder_routing)

    def loss(self, b: Builder, logits: Any, labels: Any) -> Any:
        """Mean cross-entropy of logits [B, T, V] at labels [B, T]; label -100 is left out."""
        return label_loss(logits, labels)

    def shifted(self, b: Builder, labels: Any) -> Any:
        """What the decoder reads to write labels [B, T]: the start token and all but the last."""
        return shift_right(labels, self.start_token)

    def encode(self, b: Builder, ids: Any, mask: Any = None, **given: Any) -> Any:
        """What the encoder makes of source ids [B, S], [B, S, d]."""
        hidden = padding_bias(ids, mask, b.spec.precision.compute_dtype)
        memory, _ = self._read(b, ids, mask, hidden, given, alone=True)
        return memory

    def new_cache(self, b: Builder, memory: Any, length: Any, mask: Any = None) -> Any:
        """A cache for up to `length` target tokens, with the source's keys and values."""
        source = padding_bias(memory[:, :, 0], mask, b.spec.precision.compute_dtype)
        layers = b.child("decoder", self._layer("decoder"), memory, length)
        return b.record("Cache", source=source, layers=layers)

    def step(self, b: Builder, ids: Any, start: Any, cache: Any, **given: Any) -> Any:
        """ids [B, T] at positions start, start + 1, ... to logits [B, T, V]; fills the cache."""
        known = known_ids(b, self.stacks()["decoder"].routed(), ids, given)
        x = self._embed(b, ids, start + torch.arange(ids.shape[1], device=ids.device))
        stack = self._layer("decoder")
        x = b.child("decoder", stack, x, start, cache.layers, cache.source, *known.values())
        return self._logits(b, x)

    def update_balance(self, b: Builder, routing: Any) -> Any:
        """Move the routers' balance biases by the loads of a step's Output.routing."""
        first = len(self.stacks()["encoder"].routed())
        for name, part in (("encoder", slice(0, first)), ("decoder", slice(first, None))):
            stack = self._layer(name)
            if stack.balanced:
                b.child(name, stack, routing[part])

    # Parts

    def _layer(self, name: str) -> SequenceStack:
        """A stack as the child that holds it."""
        stack = self.stacks()[name]
        routed = stack.routed()
        kind = EncoderStack if name == "encoder" else DecoderStack
        return kind(
            layers=stack.layers,
            ids=tuple(dict.fromkeys(n for one in routed for n in one.moe.given())),
            routed=bool(routed),
            balanced=any(one.moe.router.balance_bias for one in routed),
        )

    def _read(
        self,
        b: Builder,
        ids: Any,
        mask: Any,
        hidden: Any,
        given: dict[str, Any],
        alone: bool = False,
    ) -> tuple[Any, Any]:
        """What the encoder makes of ids [B, S], and its routing records; None if alone or none."""
        stack = self._layer("encoder")
        x = self._embed(b, ids, torch.arange(ids.shape[1], device=ids.device))
        valid = real_tokens(ids, mask) if stack.routed else None
        known = known_ids(b, self.stacks()["encoder"].routed(), ids, given)
        inputs = (x, hidden, valid, *known.values())
        if alone or not stack.routed:
            memory = b.child("encoder", stack, *inputs)
            return memory, None
        memory, encoder_routing = b.child("encoder", stack, *inputs)
        return memory, encoder_routing

    def _output(self, b: Builder, logits: Any, valid: Any, *routings: Any) -> Any:
        """The record; losses of a stack's layers are reduced by themselves, and added."""
        losses: dict[str, Any] = {}
        routing = None
        both = all(r is not None for r in routings)
        for side, of_stack in zip(("encoder", "decoder"), routings, strict=True):
            if of_stack is None:
                continue
            for name, own in total_losses(b, self.moe, of_stack).items():
                loss = b.name(own, f"{side}_{name}" if both else name)
                losses[name] = b.name(losses[name] + loss, name) if name in losses else loss
            routing = of_stack if routing is None else routing + of_stack
        if self.head.z_loss:
            losses["output_z"] = output_z_loss(logits, valid) * self.head.z_loss
        fields: dict[str, Any] = {}
        if routing is not None or losses:
            fields["losses"] = losses
        if routing is not None:
            fields["routing"] = routing
        return b.record("Output", logits=logits, **fields)

    def _embed(self, b: Builder, ids: Any, positions: Any) -> Any:
        """Vectors [B, S, d] of ids [B, S] at positions [S]."""
        table = b.param("embedding", self.vocab_size, self.d_model, role="embedding")
        x = F.embedding(ids, table)
        factor = self.embedding.factor(self.d_model)
        x = x if factor == 1.0 else x * factor
        if isinstance(self.positions, Sinusoidal):
            path = ("positions",)
            x = x + b.inline(self.positions, "vectors", positions, self.d_model, path=path)
        return x

    def _logits(self, b: Builder, x: Any) -> Any:
        return b.inline(self.head, "logits", x, self.vocab_size, path=("head",))


# What attention here has no form of.
_DECODERS_ALONE = ("window", "sinks", "softcap", "clip", "qk_norm", "temperature")
