"""Attention of encoders and decoders: with biases of positions, and across from one to other."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field

from moegen.arch.attention import Attention, GroupedQueryAttention
from moegen.arch.block import Block
from moegen.arch.positions import Relative
from moegen.graph.builder import Builder
from moegen.graph.layer import Layer
from moegen.ops.biased_attention import biased_attention
from moegen.spec.element import OneOf


class BiasedAttention(GroupedQueryAttention):
    """Attention within a stack. Made by the model from its attention section."""

    kind: None = None  # type: ignore[assignment]  # no member of the family: specs have no word
    relative: Relative | None = Field(None, description="its own table of relative positions")
    shared: bool = Field(False, description="whether the stack has a table for all its layers")

    def _biased(self, b: Builder, q: Any, k: Any, v: Any, context: Any, **causal: bool) -> Any:
        """Attention with a bias: of a table, and of what may not be seen."""
        bias = context.bias
        if self.relative:
            bias = b.inline(self.relative, "bias", context.buckets, self.heads, path=POSITIONS)
            if not causal:
                bias = bias + context.hidden
        return biased_attention(q, k, v, bias, self._scale(b), **causal)


POSITIONS = ("model", "positions")


class EncoderAttention(BiasedAttention):
    """Every position sees all real tokens of its sequence."""

    causal: ClassVar[bool] = False

    def programs(self) -> tuple[str, ...]:
        """It sees later positions, so there is no decoding."""
        return ("forward",)

    def forward(self, b: Builder, x: Any, context: Any) -> Any:
        """x [B, S, d] to [B, S, d]; what padding holds is not seen."""
        q, k, v = self._project(b, x, context)
        if self.relative or self.shared:
            out = self._biased(b, q, k, v, context)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=context.hidden, **self._options()
            )
        return self._merge(b, out)


class DecoderAttention(BiasedAttention):
    """No position sees later ones."""

    def _attend(self, b: Builder, q: Any, k: Any, v: Any, context: Any) -> Any:
        if self.relative or self.shared:
            return self._biased(b, q, k, v, context, causal=True)
        return super()._attend(b, q, k, v, context)

    def _look_up(self, b: Builder, q: Any, k: Any, v: Any, mask: Any, context: Any) -> Any:
        if self.relative or self.shared:
            return self._biased(b, q, k, v, context)
        return super()._look_up(b, q, k, v, mask, context)


class CrossAttention(Layer):
    """Attention from a decoder's positions to what the encoder made of the source."""

    of: Annotated[GroupedQueryAttention, OneOf(Attention)]

    def describe(self, spec: Any) -> str:
        """`Attention from the target to the source: 12 heads of 64.`"""
        width = self.of.rope_width(spec.model.d_model)
        return f"Attention from the target to the source: {self.of.heads} heads of {width}."

    def programs(self) -> tuple[str, ...]:
        """Training, decoding and the keys and values that decoding reads."""
        return ("forward", "step", "new_cache")

    def forward(self, b: Builder, x: Any, memory: Any, hidden: Any) -> Any:
        """x [B, T, d] and the encoder's memory [B, S, d] to [B, T, d]."""
        k, v = self._heads(b, "key", memory), self._heads(b, "value", memory)
        return self._look_up(b, x, k, v, hidden)

    def step(self, b: Builder, x: Any, cache: Any, hidden: Any) -> Any:
        """x [B, T, d] to [B, T, d], with keys and values that are there already."""
        keys, values = cache
        keys, values = self.of._read(b, keys), self.of._read(b, values)
        return self._look_up(b, x, keys, values, hidden)

    def new_cache(self, b: Builder, memory: Any) -> Any:
        """Keys and values of the source, [B, kv_heads, S, head_dim] each."""
        k, v = self._heads(b, "key", memory), self._heads(b, "value", memory)
        dtype = b.spec.precision.cache_dtype
        if dtype != b.spec.precision.compute_dtype:
            k, v = k.to(dtype), v.to(dtype)
        return k, v

    def _look_up(self, b: Builder, x: Any, k: Any, v: Any, hidden: Any) -> Any:
        q = self._heads(b, "query", x)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, **self.of._options())
        return self.of._merge(b, out)

    def _heads(self, b: Builder, name: str, x: Any) -> Any:
        """Queries, keys or values of x [B, S, d], [B, heads, S, head_dim]."""
        width = self.of.rope_width(b.width)
        heads = self.of.heads if name == "query" else (self.of.kv_heads or self.of.heads)
        out = self.of._linear(b, name, x, heads * width)
        return b.name(out.unflatten(-1, (heads, width)).transpose(1, 2), name[0])


class CrossBlock(Block):
    """One layer of a decoder that reads a source: it attends to itself, then to the source."""

    cross: CrossAttention

    def describe(self, spec: Any) -> str:
        """`Attention, attention to the source and a mixture of experts, each on a ... branch.`"""
        part = "a mixture of experts" if self.moe else "a feed-forward network"
        return f"Attention, attention to the source and {part}, each on a residual branch."

    def new_cache(self, b: Builder, memory: Any, length: Any) -> Any:
        """What self-attention keeps between steps, and the source's keys and values."""
        path = ("model", "attention")
        own = b.child(
            "attention", self.attention, memory.shape[0], length, path=path, role="attention"
        )
        source = b.child("cross", self.cross, memory, path=path, role="attention")
        return own, source

    def _attention(self, b: Builder, x: Any, context: Any, *cache: Any) -> Any:
        path = ("model", "attention")
        if cache:
            own, source = cache[0]
            x = super()._attention(b, x, context, own)
        else:
            source = context.memory
            x = super()._attention(b, x, context)
        h = self._before(b, "cross_norm", x)
        out = b.child("cross", self.cross, h, source, context.source, path=path, role="attention")
        return self._after(b, "cross_norm", x, out)
