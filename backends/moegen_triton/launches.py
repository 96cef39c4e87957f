"""The kernels' launches on tensors of a layer's sizes: to compile them and to time them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moegen_triton.kernels.activations import is_gated
from moegen_triton.kernels.down import down
from moegen_triton.kernels.hidden_gradient import hidden_gradient
from moegen_triton.kernels.up import up
from moegen_triton.kernels.weight_gradient import weight_gradient


class Layer(NamedTuple):
    """Sizes of routed experts; compilation asks no more than whether 16 divides them."""

    tokens: int = 64
    choices: int = 2
    experts: int = 4
    d: int = 512
    n: int = 256
    dtype: torch.dtype = torch.bfloat16
    activation: str = "swiglu"
    device: str = "cpu"

    @property
    def rows(self) -> int:
        """One for each choice of each token."""
        return self.tokens * self.choices

    @property
    def width(self) -> int:
        """Hidden numbers of a row before the activation."""
        return (1 + is_gated(self.activation)) * self.n

    def tensor(self, *shape: int) -> Tensor:
        """Return numbers like those of a layer in training; zeros if nobody reads them."""
        x = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return x if self.device == "cpu" else x.normal_()

    def routing(self) -> tuple[Tensor, Tensor]:
        """Return order [N] and ends [E] of choices that fall on experts by chance."""
        if self.device == "cpu":
            return torch.zeros(self.rows, dtype=torch.int64), torch.zeros(
                self.experts, dtype=torch.int32
            )
        scores = torch.rand(self.tokens, self.experts, device=self.device)
        chosen = scores.topk(self.choices, dim=1).indices.flatten()
        ends = torch.bincount(chosen, minlength=self.experts).cumsum(0)
        return chosen.argsort(stable=True), ends.to(torch.int32)

    def weights(self) -> Tensor:
        """Return a weight for each choice [T, K], in float32."""
        return torch.ones(self.tokens, self.choices, device=self.device)


Launch = Callable[[], object]


def _up(x: Layer, *, gathered: bool = True, bias: bool = False) -> Launch:
    order, ends = x.routing()
    return partial(
        up,
        x.tensor(x.tokens if gathered else x.rows, x.d),
        order if gathered else None,
        x.choices,
        x.tensor(x.experts, x.width, x.d),
        x.tensor(x.experts, x.width) if bias else None,
        ends,
        x.activation,
        {},
        save=True,
    )


def _down(x: Layer, *, bias: bool = False) -> Launch:
    biases = x.tensor(x.experts, x.d) if bias else None
    rows, matrix = x.tensor(x.rows, x.n), x.tensor(x.experts, x.d, x.n)
    return partial(down, rows, matrix, biases, x.routing()[1], zero_tail=False)


def _input_gradient(x: Layer) -> Launch:
    rows, matrix = x.tensor(x.rows, x.width), x.tensor(x.experts, x.width, x.d)
    return partial(down, rows, matrix, None, x.routing()[1], transposed=True, zero_tail=False)


def _hidden_gradient(x: Layer, *, gathered: bool = True, bias: bool = False) -> Launch:
    order, ends = x.routing()
    return partial(
        hidden_gradient,
        x.tensor(x.tokens if gathered else x.rows, x.d),
        order if gathered else None,
        x.choices,
        x.weights() if gathered else None,
        ends,
        x.tensor(x.experts, x.d, x.n),
        x.tensor(x.experts, x.d) if bias else None,
        x.tensor(x.rows, x.width),
        x.activation,
        {},
        wants_weights=gathered,
    )


def _down_weight(x: Layer, *, bias: bool = False) -> Launch:
    (order, ends), left, right = x.routing(), x.tensor(x.tokens, x.d), x.tensor(x.rows, x.n)
    weights = x.weights() if bias else None
    return partial(weight_gradient, left, right, order, x.choices, "left", ends, weights, bias)


def _up_weight(x: Layer, *, gathered: bool = True) -> Launch:
    (order, ends), left = x.routing(), x.tensor(x.rows, x.width)
    if gathered:
        right = x.tensor(x.tokens, x.d)
        return partial(weight_gradient, left, right, order, x.choices, "right", ends)
    right = x.tensor(x.rows, x.d)
    return partial(weight_gradient, left, right, None, x.choices, "none", ends)


#: By kernel, the ways that it is launched.
LAUNCHES: dict[str, dict[str, Callable[[Layer], Launch]]] = {
    "up": {
        "gathered": _up,
        "bias": partial(_up, bias=True),
        "rows": partial(_up, gathered=False),
    },
    "down": {"rows": _down, "bias": partial(_down, bias=True)},
    "hidden_gradient": {
        "gathered": _hidden_gradient,
        "bias": partial(_hidden_gradient, bias=True),
        "rows": partial(_hidden_gradient, gathered=False),
    },
    "input_gradient": {"rows": _input_gradient},
    "weight_gradient": {
        "left": _down_weight,
        "bias": partial(_down_weight, bias=True),
        "right": _up_weight,
        "rows": partial(_up_weight, gathered=False),
    },
}
