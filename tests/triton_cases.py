"""Layers of routed experts with random numbers, and what plain PyTorch makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops import activations
from moegen_triton.kernels.activations import is_gated
from moegen_triton.kernels.feed_forward import routed_feed_forward

#: Activations by what a test is called: the op and its settings.
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "swiglu": (activations.swiglu, {}),
    "geglu": (activations.geglu, {}),
    "geglu tanh": (activations.geglu, {"approximate": "tanh"}),
    "reglu": (activations.reglu, {}),
    "clamped_swiglu": (activations.clamped_swiglu, {"limit": 0.9, "alpha": 1.3}),
    "relu": (F.relu, {}),
    "relu2": (activations.relu2, {}),
    "gelu": (F.gelu, {}),
    "gelu tanh": (F.gelu, {"approximate": "tanh"}),
    "silu": (F.silu, {}),
    "cubic": (activations.cubic, {}),
    "identity": (activations.identity, {}),
}


class Inputs(NamedTuple):
    """What a layer learns from, in one format; None where it has no biases."""

    tokens: Tensor
    weights: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        """Leaves of another format with the same numbers."""
        return self.map(lambda x: x.detach().to(dtype).requires_grad_())

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Every tensor changed."""
        return Inputs(*(x if x is None else change(x) for x in self))

    def present(self) -> list[Tensor]:
        """All tensors that there are."""
        return [x for x in self if x is not None]


class Layer(NamedTuple):
    """A routing, a layer's inputs and the activation between its products."""

    order: Tensor
    ends: Tensor
    inputs: Inputs
    activation: Callable[..., Tensor]
    settings: dict[str, Any]

    @property
    def gated(self) -> bool:
        """Whether up has rows of gates too."""
        return is_gated(self.activation.__name__)

    def to(self, dtype: torch.dtype) -> Layer:
        """The same layer in another format."""
        return self._replace(inputs=self.inputs.to(dtype))


def sort(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """order and ends of experts [T, K]."""
    keys, order = torch.sort(experts.flatten(), stable=True)
    return order, torch.searchsorted(keys, torch.arange(count), right=True, out_int32=True)


def layer(
    experts: list[list[int]] | Tensor,
    count: int = 4,
    d: int = 20,
    n: int = 12,
    *,
    kind: str = "swiglu",
    dtype: torch.dtype = torch.float32,
    biases: bool = False,
) -> Layer:
    """A layer of `count` experts for choices experts [T, K]; expert `count` is none."""
    activation, settings = ACTIVATIONS[kind]
    experts = torch.as_tensor(experts)
    draw = torch.Generator().manual_seed(11)
    width = 2 * n if is_gated(activation.__name__) else n

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=draw) * scale

    inputs = Inputs(
        tokens=normal(experts.shape[0], d),
        weights=torch.rand(experts.shape, generator=draw),
        up=normal(count, width, d, scale=d**-0.5),
        down=normal(count, d, n, scale=n**-0.5),
        up_bias=normal(count, width, scale=0.5) if biases else None,
        down_bias=normal(count, d, scale=0.5) if biases else None,
    )
    return Layer(*sort(experts, count), inputs.to(dtype), activation, settings)


def plain(x: Layer) -> Tensor:
    """The layer by PyTorch's own products, one expert after another."""
    tokens, weights, up, down, up_bias, down_bias = x.inputs
    k = weights.shape[1]
    stops = x.ends.tolist()
    rows = []
    for expert, (start, end) in enumerate(zip([0, *stops], stops, strict=False)):
        hidden = F.linear(
            tokens[x.order[start:end] // k],
            up[expert],
            None if up_bias is None else up_bias[expert],
        )
        values = x.activation(*hidden.chunk(2 if x.gated else 1, -1), **x.settings)
        bias = None if down_bias is None else down_bias[expert]
        rows.append(F.linear(values, down[expert], bias))
    rows.append(tokens.new_zeros(x.order.shape[0] - stops[-1], tokens.shape[1]))
    choices = torch.cat(rows)[x.order.argsort()].view(*weights.shape, tokens.shape[1])
    return (choices * weights.unsqueeze(-1)).sum(1)


def fused(x: Layer, **kwargs: Any) -> Tensor:
    """The layer by the kernels."""
    tokens, weights, *parameters = x.inputs
    kwargs |= x.settings
    return routed_feed_forward(  # type: ignore[no-any-return]
        tokens, x.order, weights, x.ends, *parameters, activation=x.activation, **kwargs
    )


def slope(out: Tensor) -> Tensor:
    """A gradient for out: the same numbers in all formats."""
    draw = torch.Generator().manual_seed(5)
    numbers = torch.randn(out.shape, generator=draw).bfloat16()
    return numbers.to(out.dtype)


def results(x: Layer, run: Callable[..., Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    out = run(x, **kwargs)
    grads = iter(torch.autograd.grad(out, x.inputs.present(), slope(out)))
    named = zip(Inputs._fields, x.inputs, strict=True)
    return {"out": out.detach()} | {k: next(grads) for k, v in named if v is not None}


def distance(x: Tensor, y: Tensor) -> float:
    """How far x is from the float64 y, by the norm of y."""
    return float((x.double() - y).norm() / y.norm().clamp(min=1e-30))


def check(x: Layer, run: Callable[..., Tensor] = fused, **kwargs: Any) -> dict[str, float]:
    """Demand at most twice the error of plain PyTorch in the same format; give the ratios."""
    exact = results(x.to(torch.float64), plain)
    usual, ours = results(x, plain), results(x, run, **kwargs)
    floor = torch.finfo(x.inputs.tokens.dtype).eps / 2
    ratios = {}
    for name, right in exact.items():
        assert ours[name].dtype == usual[name].dtype
        assert ours[name].shape == right.shape
        bound = max(distance(usual[name], right), floor)
        ratios[name] = distance(ours[name], right) / bound
    assert max(ratios.values()) <= 2, ratios
    return ratios
