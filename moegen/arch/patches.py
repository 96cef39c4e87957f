"""Images as tokens: patches, where they are in the image, and how tokens become one vector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.feed_forward import FeedForward
from moegen.arch.init import ZEROS
from moegen.arch.norm import Norm
from moegen.graph.builder import Builder
from moegen.graph.layer import Layer
from moegen.ops.images import patch_positions
from moegen.spec.element import Element, Kinds, OneOf, Path
from moegen.spec.words import counted

Positions = Literal["learned", "sincos", "none"]


class Image(Element):
    """Images of one size, cut into square patches that do not overlap."""

    size: int = Field(ge=1, le=10**5, description="height and width, pixels", examples=[224])
    patch: int = Field(ge=1, le=10**5, description="height and width of a patch", examples=[16])
    channels: int = Field(3, ge=1, le=10**4, description="values of a pixel")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """Whole patches."""
        if self.size % self.patch:
            yield ("patch",), f"patch is {self.patch} but must divide size, {self.size}"

    @property
    def side(self) -> int:
        """Patches in a row, and rows."""
        return self.size // self.patch

    def embedded(self, b: Builder, images: Any, width: int) -> Any:
        """images [B, channels, size, size] to a vector of each patch [B, side * side, width]."""
        dtype = b.spec.precision.compute_dtype
        if dtype != torch.float32:
            images = images.to(dtype)
        pixels = self.channels * self.patch**2
        # How it starts follows from its inputs, which are all values of a patch.
        start = b.spec.init.of((width, pixels), "embedding", "patches")
        shape = (width, self.channels, self.patch, self.patch)
        weight = b.param("patches", *shape, init=start, role="embedding")
        bias = b.param("patches_bias", width, init=ZEROS, role="embedding")
        x = F.conv2d(images, weight, bias, stride=self.patch)
        return x.flatten(2).transpose(1, 2)

    def placed(self, b: Builder, x: Any, positions: Positions, before: int) -> Any:
        """x [B, before + side * side, d] with what tells a token's place added."""
        if positions == "none":
            return x
        length, width = before + self.side**2, b.width
        if positions == "learned":
            return x + b.param("positions", length, width, role="embedding")
        places = b.buffer(
            "positions",
            *(length, width),
            make=patch_positions,
            rows=self.side,
            columns=self.side,
            width=width,
            before=before,
        )
        dtype = b.spec.precision.compute_dtype
        return x + (places if dtype == torch.float32 else places.to(dtype))


class Pool(Kinds):
    """How the tokens of an image become one vector."""

    default_kind: ClassVar[str | None] = "token"
    before: ClassVar[int] = 0  # tokens that it puts before the patches
    words: ClassVar[str] = ""

    def check(self, model: Any) -> Iterator[tuple[Path, str]]:
        """Rules that need the model."""
        yield from ()

    def begun(self, b: Builder, x: Any) -> Any:
        """Tokens x [B, N, d] as the first block is given them, before positions are added."""
        return x.contiguous()

    def pooled(self, b: Builder, x: Any) -> Any:
        """x [B, before + N, d] to [B, d]."""
        raise TypeError(f"{type(self).__name__} computes nothing")


class TokenPool(Pool):
    """A learned class token goes with the patches; it is the image (Dosovitskiy et al. 2021)."""

    kind: Literal["token"] = "token"
    before: ClassVar[int] = 1
    words: ClassVar[str] = "a class token"

    def begun(self, b: Builder, x: Any) -> Any:
        """The class token before the patches."""
        token = b.param("class_token", b.width, role="embedding")
        return torch.cat((token.expand(x.shape[0], 1, -1), x), 1)

    def pooled(self, b: Builder, x: Any) -> Any:
        """The first."""
        return x[:, 0]


class AveragePool(Pool):
    """The mean of all tokens."""

    kind: Literal["average"] = "average"

    def pooled(self, b: Builder, x: Any) -> Any:
        """Over tokens."""
        return x.mean(1)


class AttentionPool(Pool):
    """A learned query attends to all tokens, then a network of its own (MAP: Zhai et al. 2022)."""

    kind: Literal["attention"] = "attention"
    heads: int | None = Field(None, ge=1, le=10**6, description="heads; as many as blocks have")
    ffn: FeedForward | None = Field(None, description="the network; as that of dense blocks")

    def check(self, model: Any) -> Iterator[tuple[Path, str]]:
        """Whole heads, and a network to take after."""
        heads = self.heads or model.attention.heads
        if model.d_model % heads:
            place = ("heads",) if self.heads else ()
            yield place, f"heads ({heads}) must divide d_model ({model.d_model})"
        if self.ffn is None and model.ffn is None:
            yield (), "the model has no ffn that this could take after; say pool.ffn"

    def pooled(self, b: Builder, x: Any) -> Any:
        """By a layer of its own."""
        model = b.spec.model
        heads, ffn = self.heads or model.attention.heads, self.ffn or model.ffn
        network = PoolFeedForward(width=ffn.width, activation=ffn.activation, bias=ffn.bias)
        layer = Probe(heads=heads, norm=model.norm, ffn=network, own=self.ffn is not None)
        return b.child("pool", layer, x, path=("model", "pool"), role="head")


class PoolFeedForward(FeedForward):
    """The network of an AttentionPool."""


class Probe(Layer):
    """The layer of an AttentionPool. Made by it."""

    heads: int
    norm: Annotated[Norm, OneOf(Norm)]
    ffn: PoolFeedForward
    own: bool  # whether the spec says a network for it

    def class_name(self) -> str:
        """As the literature calls it."""
        return "AttentionPool"

    def describe(self, spec: Any) -> str:
        """`A learned query attends to all tokens (12 heads), then a feed-forward network.`"""
        heads = counted(self.heads, "head")
        return f"A learned query attends to all tokens ({heads}), then a feed-forward network."

    def forward(self, b: Builder, x: Any) -> Any:
        """x [B, S, d] to [B, d]."""
        probe = b.param("probe", b.width)
        q = self._linear(b, "query", probe.view(1, 1, -1))
        k = self._linear(b, "key", x)
        v = self._linear(b, "value", x)
        heads = (self.heads, b.width // self.heads)
        q = q.unflatten(-1, heads).transpose(1, 2)
        k = k.unflatten(-1, heads).transpose(1, 2)
        v = v.unflatten(-1, heads).transpose(1, 2)
        seen = F.scaled_dot_product_attention(q.expand(x.shape[0], -1, -1, -1), k, v)
        out = self._linear(b, "output", seen.transpose(1, 2).flatten(1))
        path = ("model", "norm")
        h = b.inline(self.norm, "apply", "ffn_norm", out, b.width, path=path)
        place: Path = ("model", "pool", "ffn") if self.own else ("model", "ffn")
        x = out + b.child("ffn", self.ffn, h, path=place, role="head")
        return x

    def _linear(self, b: Builder, name: str, x: Any) -> Any:
        bias = b.param(f"{name}_bias", b.width, init=ZEROS)
        return F.linear(x, b.param(name, b.width, b.width), bias)
