"""Multi-head, grouped-query and multi-query attention, in full or within a sliding window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.init import ZEROS, normal
from moegen.arch.norm import RMSNorm
from moegen.arch.placement import Placement
from moegen.arch.rope import Rope
from moegen.graph.builder import Builder
from moegen.graph.layer import Layer
from moegen.ops.attention import (
    at_most,
    capped_attention,
    chunk_attention,
    masked_capped_attention,
    masked_sink_attention,
    ring_positions,
    scale_queries,
    sink_attention,
    window_attention,
    write_cache,
)
from moegen.spec.element import Element, Kinds, Path


class Window(Element):
    """A sliding window: each position sees itself and the size - 1 before it."""

    shorthand = "size"

    size: int = Field(ge=1, le=10**9, description="positions that a query sees, its own included")
    placement: Placement = Field(Placement(), description="the layers that have the window")
    rope: Rope | None = Field(None, description="another rotary embedding for these layers")
    chunked: bool = Field(
        False, description="a position sees its own chunk of `size` alone, up to itself (Llama 4)"
    )

    def rules(self) -> Iterator[tuple[Path, str]]:
        """A window is on layers that are there."""
        if self.placement.insert:
            yield ("placement", "insert"), "insert adds routed layers, not windows"


class Attention(Kinds, Layer):
    """How positions exchange information. Programs: forward, step (with cache), new_cache."""

    default_kind: ClassVar[str | None] = "gqa"
    causal: ClassVar[bool] = True  # no position sees later ones

    heads: int = Field(ge=1, le=10**6, description="query heads")
    rope: Rope | None = Field(Rope(), description="rotary position embedding, or null")
    window: Window | None = Field(None, description="sliding window, in all or some layers")

    def programs(self) -> tuple[str, ...]:
        """Training, decoding and the cache that decoding needs."""
        return ("forward", "step", "new_cache")

    def in_layer(self, layer: int, depth: int) -> Attention:
        """This attention as it is in one layer: with the window, or without."""
        if self.window is None:
            return self
        if layer not in self.window.placement.of(depth):
            return self.model_copy(update={"window": None})
        rope = self.window.rope or self.rope
        plain = Window(size=self.window.size, chunked=self.window.chunked)
        return self.model_copy(update={"window": plain, "rope": rope})

    def rope_width(self, d_model: int) -> int:
        """Dimensions of a head that a rotary embedding may turn."""
        raise TypeError(f"{type(self).__name__} has no heads")

    def check(self, d_model: int) -> Iterator[tuple[Path, str]]:
        """Rules that need the model's width."""
        yield from ()


class Temperature(Element):
    """Queries grow with their position: times 1 + scale ln(1 + floor((position + 1) / floor)).

    In layers without a rotary embedding, so that attention stays sharp at long range (Llama 4).
    """

    shorthand = "scale"

    scale: float = Field(gt=0, le=10, description="how fast they grow", examples=[0.1])
    floor: float = Field(8192.0, gt=0, le=1e9, description="positions of each step")


class GroupedQueryAttention(Attention):
    """Heads of queries that share heads of keys and values (Ainslie et al. 2023).

    kv_heads = heads is multi-head attention (Vaswani et al. 2017), kv_heads = 1 multi-query
    attention (Shazeer 2019).
    """

    kind: Literal["gqa"] = "gqa"
    kv_heads: int | None = Field(None, ge=1, description="heads of keys and values; as heads")
    head_dim: int | None = Field(None, ge=1, le=10**6, description="width of a head")
    bias: Literal["none", "qkv", "all"] = Field("none", description="which projections have one")
    qk_norm: Literal["none", "head", "full", "unit"] = Field(
        "none",
        description="RMS-normalise queries and keys: each head, over all heads, or each head "
        "without weights after rope, where there is rope (Llama 4)",
    )
    qk_norm_eps: float = Field(1e-6, gt=0, le=1, description="eps of that norm")
    sinks: bool = Field(False, description="a learned logit a head for attending to nothing")
    softcap: float | None = Field(None, gt=0, description="bound of the logits, by tanh")
    clip: float | None = Field(None, gt=0, description="bound of queries, keys and values")
    scale: float | None = Field(None, gt=0, description="of the logits; head_dim^-1/2")
    temperature: Temperature | None = Field(
        None, description="in layers without rope, queries grow with their position"
    )

    def rules(self) -> Iterator[tuple[Path, str]]:
        """Whole groups, even rotary dimensions, one special form of the logits at a time."""
        if self.kv_heads and self.heads % self.kv_heads:
            yield ("kv_heads",), f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})"
        if self.sinks and self.softcap:
            yield ("softcap",), "attention with sinks has no softcap here; choose one of them"
        if self.window and self.window.chunked and (self.sinks or self.softcap):
            word = "sinks" if self.sinks else "softcap"
            yield (word,), f"chunked windows have no {word} here; remove one of them"
        if self.temperature and self.rope:
            yield ("temperature",), "temperature is for layers without rope; say rope: null"

    def check(self, d_model: int) -> Iterator[tuple[Path, str]]:
        """The width must split into heads, and a head into pairs."""
        if self.head_dim is None and d_model % self.heads:
            yield ("heads",), f"heads ({self.heads}) must divide d_model ({d_model})"
            return
        width = self.rope_width(d_model)
        if self.rope and not self.rope.dim and width % 2:
            yield ("head_dim",), f"rope turns pairs, so head_dim must be even, not {width}"
        if self.rope and (self.rope.dim or 0) > width:
            yield ("rope", "dim"), f"dim is {self.rope.dim} but a head is {width} wide"

    def class_name(self) -> str:
        """Named apart where windows alternate."""
        return "SlidingAttention" if self.window else "Attention"

    def describe(self, spec: Any) -> str:
        """`Grouped-query attention: 32 heads of 128, 8 of keys and values.`"""
        kv_heads = self.kv_heads or self.heads
        kind = {1: "Multi-query", self.heads: "Multi-head"}.get(kv_heads, "Grouped-query")
        shared = "" if kv_heads == self.heads else f", {kv_heads} of keys and values"
        window = f", window of {self.window.size}" if self.window else ""
        width = self.rope_width(spec.model.d_model)
        return f"{kind} attention: {self.heads} heads of {width}{shared}{window}."

    def rope_width(self, d_model: int) -> int:
        """The whole head."""
        return self.head_dim or d_model // self.heads

    # Programs

    def forward(self, b: Builder, x: Any, context: Any) -> Any:
        """x [B, S, d] to [B, S, d], causal."""
        q, k, v = self._project(b, x, context)
        if self._warms():
            q = self._warmed(q, torch.arange(x.shape[1], device=x.device))
        out = self._attend(b, q, k, v, context)
        return self._merge(b, out)

    def step(self, b: Builder, x: Any, context: Any, cache: Any) -> Any:
        """x [B, T, d] at context.positions to [B, T, d], with all that the cache holds."""
        q, k, v = self._project(b, x, context)
        keys, values = cache
        positions = context.positions
        if self._warms():
            q = self._warmed(q, positions)
        if self.window is None:
            keys = write_cache(keys, positions, k)
            values = write_cache(values, positions, v)
            held = torch.arange(keys.shape[2], device=x.device)
            mask = held <= positions.unsqueeze(-1)
            seen, told = self._read(b, keys), self._read(b, values)
            out = self._look_up(b, q, seen, told, mask, context)
            return self._merge(b, out)
        size = keys.shape[2]
        held = torch.cat((ring_positions(context.start, size, x.device), positions))
        distance = positions.unsqueeze(-1) - held
        near = distance < self.window.size
        if self.window.chunked:
            near = held // self.window.size == (positions // self.window.size).unsqueeze(-1)
        mask = (held >= 0) & (distance >= 0) & near
        seen = torch.cat((self._read(b, keys), k), 2)
        told = torch.cat((self._read(b, values), v), 2)
        out = self._look_up(b, q, seen, told, mask, context)
        slots = positions[-size:] % size
        write_cache(keys, slots, k[:, :, -size:])
        write_cache(values, slots, v[:, :, -size:])
        return self._merge(b, out)

    def new_cache(self, b: Builder, batch: Any, length: Any) -> Any:
        """Keys and values, [batch, kv_heads, length or window, head_dim]."""
        if self.window:
            length = at_most(length, self.window.size)
        width = self.rope_width(b.width)
        shape = (batch, self.kv_heads or self.heads, length, width)
        weight = b.param("query", *self._query_shape(b))
        dtype = b.spec.precision.cache_dtype
        keys = torch.zeros(shape, dtype=dtype, device=weight.device)
        return keys, torch.zeros_like(keys)

    # Parts

    def _query_shape(self, b: Builder) -> tuple[int, int]:
        d_model = b.width
        return self.heads * self.rope_width(d_model), d_model

    def _project(self, b: Builder, x: Any, context: Any) -> tuple[Any, Any, Any]:
        """Queries, keys and values, [B, heads, S, head_dim], turned by their positions."""
        width = self.rope_width(b.width)
        kv_heads = self.kv_heads or self.heads
        q = self._linear(b, "query", x, self.heads * width)
        k = self._linear(b, "key", x, kv_heads * width)
        v = self._linear(b, "value", x, kv_heads * width)
        if self.clip:
            q = q.clamp(-self.clip, self.clip)
            k = k.clamp(-self.clip, self.clip)
            v = v.clamp(-self.clip, self.clip)
        norm = RMSNorm(eps=self.qk_norm_eps)
        if self.qk_norm == "full":
            q = norm.apply(b, "query_norm", q, self.heads * width)
            k = norm.apply(b, "key_norm", k, kv_heads * width)
        q = q.unflatten(-1, (self.heads, width)).transpose(1, 2)
        k = k.unflatten(-1, (kv_heads, width)).transpose(1, 2)
        v = v.unflatten(-1, (kv_heads, width)).transpose(1, 2)
        if self.qk_norm == "head":
            q = norm.apply(b, "query_norm", q, width)
            k = norm.apply(b, "key_norm", k, width)
        if self.rope:
            cos, sin = b.spec.model.rotary(self.rope, context)
            q = self.rope.rotate(q, cos, sin, width)
            k = self.rope.rotate(k, cos, sin, width)
            if self.qk_norm == "unit":
                q = F.rms_norm(q, (width,), None, self.qk_norm_eps)
                k = F.rms_norm(k, (width,), None, self.qk_norm_eps)
        return q, k, v

    def _warms(self) -> bool:
        return self.temperature is not None and self.rope is None

    def _warmed(self, q: Any, positions: Any) -> Any:
        assert self.temperature is not None
        return scale_queries(q, positions, self.temperature.scale, self.temperature.floor)

    def _linear(self, b: Builder, name: str, x: Any, width: int) -> Any:
        bias = None
        if self.bias != "none":
            bias = b.param(f"{name}_bias", width, init=ZEROS)
        return F.linear(x, b.param(name, width, b.width), bias)

    def _read(self, b: Builder, cache: Any) -> Any:
        precision = b.spec.precision
        same = precision.cache_dtype == precision.compute_dtype
        return cache if same else cache.to(precision.compute_dtype)

    def _attend(self, b: Builder, q: Any, k: Any, v: Any, context: Any) -> Any:
        """Causal attention over a whole sequence."""
        window = {"window": self.window.size} if self.window else {}
        if self.sinks:
            return sink_attention(q, k, v, self._sinks(b), self._scale(b), **window)
        if self.softcap:
            return capped_attention(q, k, v, self.softcap, self._scale(b), **window)
        if self.window:
            attend = chunk_attention if self.window.chunked else window_attention
            return attend(q, k, v, self.window.size, self._scale(b))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **self._options())

    def _look_up(self, b: Builder, q: Any, k: Any, v: Any, mask: Any, context: Any) -> Any:
        """Attention of a few positions to what a cache holds, under a mask."""
        if self.sinks:
            return masked_sink_attention(q, k, v, mask, self._sinks(b), self._scale(b))
        if self.softcap:
            return masked_capped_attention(q, k, v, mask, self.softcap, self._scale(b))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self._options())

    def _sinks(self, b: Builder) -> Any:
        return b.param("sinks", self.heads, init=normal(0.02))

    def _scale(self, b: Builder) -> float:
        return self.scale or float(self.rope_width(b.width) ** -0.5)

    def _options(self) -> dict[str, Any]:
        """What torch's kernel is told beyond its defaults."""
        options: dict[str, Any] = {}
        if self.scale:
            options["scale"] = self.scale
        if self.kv_heads not in (None, self.heads):
            options["enable_gqa"] = True
        return options

    def _merge(self, b: Builder, out: Any) -> Any:
        d_model = b.width
        inner = self.heads * self.rope_width(d_model)
        bias = b.param("output_bias", d_model, init=ZEROS) if self.bias == "all" else None
        weight = b.param("output", d_model, inner)
        return F.linear(out.transpose(1, 2).flatten(2), weight, bias)


class BidirectionalAttention(GroupedQueryAttention):
    """Attention in which every position sees all of its sequence, as encoders have it."""

    kind: Literal["bidirectional"] = "bidirectional"  # type: ignore[assignment]
    causal: ClassVar[bool] = False
    rope: Rope | None = Field(None, description="rotary position embedding, or null")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What a view of everything leaves no use for."""
        yield from super().rules()
        for name in ("window", "sinks", "softcap"):
            if getattr(self, name):
                yield (name,), f"{name} is for causal attention here; remove it"

    def programs(self) -> tuple[str, ...]:
        """It sees later positions, so there is no decoding."""
        return ("forward",)

    def forward(self, b: Builder, x: Any, context: Any) -> Any:
        """x [B, S, d] to [B, S, d]."""
        q, k, v = self._project(b, x, context)
        out = b.spec.model.attend(q, k, v, context, **self._options())
        return self._merge(b, out)
