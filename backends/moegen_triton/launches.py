"""The kernels' launches on tensors of a layer's sizes: to compile them and to time them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moegen_triton.kernels.activations import is_gated
from moegen_triton.kernels.combine import combine, combine_rows_of_tokens, gather_rows
from moegen_triton.kernels.dense import clamped_swiglu
from moegen_triton.kernels.dispatch import expert_load, inverse, sort_by_expert
from moegen_triton.kernels.down import down
from moegen_triton.kernels.hidden_gradient import hidden_gradient
from moegen_triton.kernels.router import route
from moegen_triton.kernels.up import up
from moegen_triton.kernels.weight_gradient import bias_gradient, weight_gradient


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


def _sort(x: Layer, *, tokens: int) -> Launch:
    experts = torch.zeros(tokens, x.choices, dtype=torch.int64, device=x.device)
    return partial(sort_by_expert, experts, x.experts)


def _load(x: Layer) -> Launch:
    experts = torch.zeros(x.tokens, x.choices, dtype=torch.int64, device=x.device)
    valid = torch.ones(x.tokens, dtype=torch.bool, device=x.device)
    return partial(expert_load, experts, x.experts, valid)


def _with_gradients(op: Callable[..., Tensor], *inputs: Tensor) -> Launch:
    """Return an op's passes forward and backward."""

    def both() -> None:
        for x in inputs:
            x.requires_grad_(x.is_floating_point())
        op(*inputs).sum().backward()  # type: ignore[no-untyped-call]

    return both


def _combine(x: Layer) -> Launch:
    order, _ = x.routing()
    return _with_gradients(combine, x.tensor(x.rows, x.d), order, x.weights())


def _gather(x: Layer) -> Launch:
    return _with_gradients(gather_rows, x.tensor(x.tokens, x.d), x.routing()[0])


def _combine_alone(x: Layer) -> Launch:
    (order, ends), rows = x.routing(), x.tensor(x.rows, x.d)

    def launch() -> Tensor:
        return combine_rows_of_tokens(rows, inverse(order), ends, x.weights(), x.tokens)

    return launch


def _route(x: Layer, *, affinity: str) -> Launch:
    router = x.tensor(x.experts, x.d).float()

    def weights(tokens: Tensor, router: Tensor) -> Tensor:
        return route(tokens, router, k=x.choices, affinity=affinity, normalize="sum")[3]

    return _with_gradients(weights, x.tensor(x.tokens, x.d), router)


def _dense(x: Layer) -> Launch:
    gate, up = x.tensor(x.tokens, x.n), x.tensor(x.tokens, x.n)
    return _with_gradients(partial(clamped_swiglu, limit=7.0, alpha=1.7), gate, up)


#: Kernels without a choice of tiles, by what they do.
OTHERS: dict[str, Callable[[Layer], Launch]] = {
    "sort few": partial(_sort, tokens=64),
    "sort many": partial(_sort, tokens=16384),
    "count": _load,
    "combine": _combine,
    "combine in a layer": _combine_alone,
    "gather": _gather,
    "bias gradient": lambda x: partial(bias_gradient, x.tensor(x.rows, x.d), x.routing()[1]),
    "dense activation": _dense,
    "route softmax": partial(_route, affinity="softmax"),
    "route sigmoid": partial(_route, affinity="sigmoid"),
}
