"""What the ops of feed_forward.py cost and keep; nothing of this is emitted."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Work:
    """N rows through the networks of experts, of tokens that came in under the name `source`."""

    rows: int
    tokens: Tensor
    source: str
    routing: tuple[str, ...]
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    recompute: bool

    @property
    def flops(self) -> int:
        """Two products for each row."""
        return 2 * self.rows * (self.up[0].numel() + self.down[0].numel())

    @property
    def backward(self) -> Fraction:
        """Two products for each, sums for biases, and the first product once more, over flops."""
        more = 0 if self.up_bias is None else 2 * self.rows * self.up.shape[1]
        more += 0 if self.down_bias is None else 2 * self.rows * self.down.shape[1]
        more += 2 * self.rows * self.up[0].numel() if self.recompute else 0
        return 2 + Fraction(more, max(self.flops, 1))

    @property
    def shares(self) -> dict[str, Fraction]:
        """Of that, for each input: a product each, and sums for biases."""
        first, second = self.up.shape[1], self.down.shape[1]
        products = (
            2 * self.rows * self.up[0].numel(),
            2 * self.rows * self.down[0].numel(),
        )
        found = {self.source: products[0], "up": products[0], "down": products[1]}
        found |= {} if self.up_bias is None else {"up_bias": 2 * self.rows * first}
        found |= {} if self.down_bias is None else {"down_bias": 2 * self.rows * second}
        return {k: Fraction(work, max(self.flops, 1)) for k, work in found.items()}

    @property
    def saves(self) -> tuple[str, ...]:
        """Tokens, unless the op had to cast them, how they were routed, and parameters."""
        same = self.tokens.dtype == self.up.dtype
        parameters = ("up", "down", "up_bias", "down_bias")
        return (*([self.source] if same else []), *self.routing, *parameters)

    @property
    def extra(self) -> int:
        """The first product, and tokens that were cast."""
        cast = self.tokens.dtype != self.up.dtype
        values = self.tokens.numel() if cast else 0
        values += 0 if self.recompute else self.rows * self.up.shape[1]
        return values * self.up.element_size()

    @property
    def inside(self) -> tuple[int, int]:
        """Rows in and out, and activations; backward the gradients of these besides."""
        d, wide, n = self.down.shape[1], self.up.shape[1], self.down.shape[2]
        again = wide if self.recompute else 0
        size = self.rows * self.up.element_size()
        return (2 * d + 2 * n + again) * size, (3 * d + 6 * n + wide + again) * size


def routed_work(
    tokens: Tensor,
    order: Tensor,
    weights: Tensor,
    ends: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    recompute: bool = False,
    **_: Any,
) -> Work:
    """The work of routed_feed_forward, from its arguments."""
    kept = ("order", "weights", "ends")
    biases = (up_bias, down_bias)
    return Work(order.shape[0], tokens, "tokens", kept, up, down, *biases, recompute)


def grouped_work(
    rows: Tensor,
    ends: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    recompute: bool = False,
    **_: Any,
) -> Work:
    """The work of grouped_feed_forward, from its arguments."""
    biases = (up_bias, down_bias)
    return Work(rows.shape[0], rows, "rows", ("ends",), up, down, *biases, recompute)
