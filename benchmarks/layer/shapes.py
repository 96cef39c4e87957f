"""The layers that are measured, and what a pass over one costs at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUTINGS = ("random", "balanced", "zipf", "hot")


@dataclass(frozen=True)
class Layer:
    """SwiGLU experts: width d, hidden width n, E experts of which a token has K."""

    name: str
    d: int
    n: int
    experts: int
    k: int
    tokens: tuple[int, ...]

    @property
    def expert_numbers(self) -> int:
        """Parameters of one expert."""
        return 3 * self.n * self.d


DECODE = (1, 8, 64)
# Up to this many tokens a pass reads each touched expert for a few rows: it serves decoding, where
# nothing is trained, and is bound by the bytes of weights.
DECODE_TOKENS = 64
TRAINED = (1024, 4096, 8192, 16384, 32768)

# A rank of eight that share DeepSeek-V3's 256 experts holds 32; with eight choices among those
# for each of its own tokens it gets as many rows as it does on average from all ranks.
LAYERS = (
    Layer("qwen3-30b-a3b", 2048, 768, 128, 8, (*DECODE, 128, *TRAINED[:2], 5034, *TRAINED[2:])),
    Layer("olmoe", 2048, 1024, 64, 8, (*DECODE, *TRAINED)),
    Layer("mixtral", 4096, 14336, 8, 2, (*DECODE, *TRAINED[1:])),
    Layer("sonic-7b-n256", 1536, 256, 128, 8, (24576,)),
    Layer("sonic-7b-n512", 1536, 512, 64, 4, (24576,)),
    Layer("sonic-7b-n1024", 1536, 1024, 32, 2, (24576,)),
    Layer("sonic-30b-n256", 4096, 256, 256, 16, (32768,)),
    Layer("sonic-30b-n512", 4096, 512, 128, 8, (32768,)),
    Layer("sonic-30b-n1024", 4096, 1024, 64, 4, (32768,)),
    Layer("deepseek-v3-ep8", 7168, 2048, 32, 8, (*DECODE, 1024, 4096, 8192)),
)
CPU_LAYERS = (
    Layer("cpu-fine", 1024, 512, 32, 4, (1024,)),
    Layer("cpu-coarse", 512, 1024, 8, 2, (2048,)),
)
TINY_LAYERS = (Layer("tiny", 20, 12, 3, 2, (1, 5)),)
BY_NAME = {layer.name: layer for layer in (*LAYERS, *CPU_LAYERS, *TINY_LAYERS)}


@dataclass(frozen=True)
class Workload:
    """A layer at a number of tokens, in a format, under a kind of routing."""

    layer: str
    tokens: int
    d: int
    n: int
    experts: int
    k: int
    dtype: str
    routing: str

    @property
    def rows(self) -> int:
        """Choices of all tokens."""
        return self.tokens * self.k

    @property
    def torch_dtype(self) -> torch.dtype:
        """The format of tokens and weights."""
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.torch_dtype.itemsize

    @property
    def decodes(self) -> bool:
        """Whether only inference is measured."""
        return self.tokens <= (1 if self.layer == "tiny" else DECODE_TOKENS)

    @property
    def flops(self) -> int:
        """Of the forward pass; the backward pass has twice as many."""
        return 6 * self.rows * self.n * self.d

    @property
    def weight_bytes(self) -> int:
        """Of all experts."""
        return 3 * self.experts * self.n * self.d * self.itemsize

    @property
    def kept_bytes(self) -> int:
        """What a backward pass needs unless it multiplies again: tokens and the first product."""
        return self.tokens * self.itemsize * (self.d + 2 * self.k * self.n)

    @property
    def title(self) -> str:
        """All that tells it from others."""
        routing = "" if self.routing == "random" else f", {self.routing} routing"
        return (
            f"{self.layer}, T={self.tokens} (d={self.d} n={self.n} E={self.experts} K={self.k}, "
            f"{self.dtype}{routing})"
        )


def workload(layer: Layer, tokens: int, dtype: str, routing: str) -> Workload:
    """The layer at a number of tokens."""
    return Workload(layer.name, tokens, layer.d, layer.n, layer.experts, layer.k, dtype, routing)


def floor_seconds(work: Workload, flops: float, bandwidth: float) -> tuple[float, float]:
    """The least that a forward and a backward pass can take, by arithmetic or by bytes.

    Forward reads tokens and weights and writes the output; backward reads gradient, tokens, the
    first product and weights and writes gradients of tokens and weights.
    """
    token_bytes = work.tokens * work.d * work.itemsize
    product = 2 * work.rows * work.n * work.itemsize
    forward = (2 * token_bytes + work.weight_bytes) / bandwidth
    backward = (3 * token_bytes + product + 2 * work.weight_bytes) / bandwidth
    return max(work.flops / flops, forward), max(2 * work.flops / flops, backward)
