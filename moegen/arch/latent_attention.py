"""Multi-head latent attention: keys and values from one small vector a position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.attention import Attention
from moegen.arch.norm import RMSNorm
from moegen.arch.rope import Rope, Yarn
from moegen.graph.builder import Builder
from moegen.ops.attention import write_cache
from moegen.spec.element import Path


class LatentAttention(Attention):
    """MLA (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Decoding uses the absorbed form: the latent is key and value of one shared head, so the
    cache holds kv_rank + rope_dim numbers a position and is never expanded.
    """

    kind: Literal["mla"] = "mla"
    q_rank: int | None = Field(None, ge=1, description="rank of the queries; null for full rank")
    kv_rank: int = Field(ge=1, description="width of the latent that is cached")
    nope_dim: int = Field(ge=1, description="width of a head's part without position")
    rope_dim: int = Field(ge=2, description="width of a head's part that turns")
    value_dim: int = Field(ge=1, description="width of a head's values")
    norm_eps: float = Field(1e-6, gt=0, le=1, description="eps of the norms on the latents")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """Positions are what the rotary part is for; a latent has no window."""
        if self.rope_dim % 2:
            yield ("rope_dim",), f"rope turns pairs, so rope_dim must be even, not {self.rope_dim}"
        if self.rope is None:
            yield ("rope",), "latent attention needs a rotary embedding for its rope_dim part"
        elif self.rope.dim not in (None, self.rope_dim):
            yield ("rope", "dim"), f"dim must be rope_dim ({self.rope_dim}) here; leave it out"
        if self.window is not None:
            yield ("window",), "latent attention has no sliding window; use kind gqa"

    def describe(self, spec: Any) -> str:
        """`Latent attention: 128 heads, 512 + 64 numbers cached a position.`"""
        cached = f"{self.kv_rank} + {self.rope_dim} numbers cached a position"
        return f"Latent attention: {self.heads} heads, {cached}."

    def rope_width(self, d_model: int) -> int:
        """The rotary part of a head."""
        return self.rope_dim

    def forward(self, b: Builder, x: Any, context: Any) -> Any:
        """x [B, S, d] to [B, S, d], causal, with keys and values expanded."""
        q_nope, q_rope = self._queries(b, x, context)
        latent, k_rope = self._latent(b, x, context)
        expanded = torch.unflatten(F.linear(latent, self._expand(b)), -1, (self.heads, -1))
        k_nope, v = expanded.transpose(1, 2).split_with_sizes([self.nope_dim, self.value_dim], -1)
        q = torch.cat((q_nope, q_rope), -1)
        k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, self.heads, -1, -1)), -1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._scale())
        return F.linear(out.transpose(1, 2).flatten(2), self._output(b))

    def step(self, b: Builder, x: Any, context: Any, cache: Any) -> Any:
        """x [B, T, d] at context.positions to [B, T, d], with all that the cache holds."""
        q_nope, q_rope = self._queries(b, x, context)
        latent, k_rope = self._latent(b, x, context)
        positions = context.positions
        (held,) = cache
        held = write_cache(held, positions, torch.cat((latent, k_rope), -1).unsqueeze(1))
        precision = b.spec.precision
        if precision.cache_dtype != precision.compute_dtype:
            held = held.to(precision.compute_dtype)
        expand = self._expand(b).unflatten(0, (self.heads, -1))
        to_key, to_value = expand.split_with_sizes([self.nope_dim, self.value_dim], 1)
        q = torch.cat((q_nope @ to_key, q_rope), -1)
        slots = torch.arange(held.shape[2], device=x.device)
        mask = slots <= positions.unsqueeze(-1)
        values = held[..., : self.kv_rank]
        out = F.scaled_dot_product_attention(
            q, held, values, attn_mask=mask, scale=self._scale(), enable_gqa=True
        )
        out = out @ to_value.transpose(1, 2)
        return F.linear(out.transpose(1, 2).flatten(2), self._output(b))

    def new_cache(self, b: Builder, batch: Any, length: Any) -> Any:
        """Latents and rotary keys, [batch, 1, length, kv_rank + rope_dim]."""
        shape = (batch, 1, length, self.kv_rank + self.rope_dim)
        device = self._expand(b).device
        latents = torch.zeros(shape, dtype=b.spec.precision.cache_dtype, device=device)
        return (latents,)

    # Parts

    def _queries(self, b: Builder, x: Any, context: Any) -> tuple[Any, Any]:
        d_model = b.width
        width = self.heads * (self.nope_dim + self.rope_dim)
        if self.q_rank is None:
            q = F.linear(x, b.param("query", width, d_model))
        else:
            q = F.linear(x, b.param("query_down", self.q_rank, d_model))
            q = RMSNorm(eps=self.norm_eps).apply(b, "query_norm", q, self.q_rank)
            q = F.linear(q, b.param("query_up", width, self.q_rank))
        q = torch.unflatten(q, -1, (self.heads, -1)).transpose(1, 2)
        q_nope, q_rope = q.split_with_sizes([self.nope_dim, self.rope_dim], -1)
        return q_nope, self._turn(b, q_rope, context)

    def _latent(self, b: Builder, x: Any, context: Any) -> tuple[Any, Any]:
        down = b.param("latent_down", self.kv_rank + self.rope_dim, b.width)
        latent, k_rope = F.linear(x, down).split_with_sizes([self.kv_rank, self.rope_dim], -1)
        latent = RMSNorm(eps=self.norm_eps).apply(b, "latent_norm", latent, self.kv_rank)
        return latent, self._turn(b, k_rope, context)

    def _turn(self, b: Builder, x: Any, context: Any) -> Any:
        rope: Rope = self.rope or Rope()
        cos, sin = b.spec.model.rotary(rope, context)
        return rope.rotate(x, cos, sin, self.rope_dim)

    def _expand(self, b: Builder) -> Any:
        width = self.heads * (self.nope_dim + self.value_dim)
        return b.param("latent_up", width, self.kv_rank)

    def _output(self, b: Builder) -> Any:
        return b.param("output", b.width, self.heads * self.value_dim)

    def _scale(self) -> float:
        scaling = self.rope.scaling if self.rope else None
        extra = scaling.softmax_scale() if isinstance(scaling, Yarn) else 1.0
        return float((self.nope_dim + self.rope_dim) ** -0.5 * extra)
