"""Activations between the products of a feed-forward network that torch has no function for.

Gated ones take two tensors of one shape.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.op import op

Gradient = Callable[..., tuple[Tensor, ...]]

# Gradients of an activation's inputs, from that of its result and the inputs. Backward passes that
# compilers trace take these, since torch.func.vjp does not go with hooks of checkpoints.
_GRADIENTS: dict[Any, Gradient] = {
    F.relu: lambda grad, x: (grad.masked_fill(x <= 0, 0),),
    F.silu: lambda grad, x: (torch.ops.aten.silu_backward(grad, x),),
    F.gelu: lambda grad, x, **form: (torch.ops.aten.gelu_backward(grad, x, **form),),
}


def _gradient_of(activation: Callable[..., Tensor]) -> Callable[[Gradient], Gradient]:
    """Note the gradient of an activation."""

    def note(gradient: Gradient) -> Gradient:
        _GRADIENTS[activation] = gradient
        return gradient

    return note


def _pull(
    activation: partial[Tensor], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """An activation of inputs, and what makes gradients of these of that of the result."""
    known = _GRADIENTS.get(activation.func)
    if known is None:
        return torch.func.vjp(activation, *inputs)  # type: ignore[return-value]
    settings = activation.keywords
    return activation(*inputs), lambda grad: known(grad, *inputs, **settings)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


@op(elementwise=True, saves=("gate", "up"), extra=lambda gate, up: _bytes(gate))
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of any one shape (Shazeer 2020, arXiv:2002.05202)."""
    return F.silu(gate) * up


@_gradient_of(swiglu)
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


@op(
    elementwise=True,
    saves=("gate", "up"),
    extra=lambda gate, up, approximate="none": _bytes(gate),
)
def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up; approximate: none or tanh (Shazeer 2020)."""
    return F.gelu(gate, approximate=approximate) * up


@_gradient_of(geglu)
def _(
    grad: Tensor, gate: Tensor, up: Tensor, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    slope = torch.ops.aten.gelu_backward(grad * up, gate, approximate=approximate)
    return slope, grad * F.gelu(gate, approximate=approximate)


@op(elementwise=True, saves=("up",), extra=lambda gate, up: _bytes(gate))
def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) * up (Shazeer 2020)."""
    return F.relu(gate) * up


@_gradient_of(reglu)
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return (grad * up).masked_fill(gate <= 0, 0), grad * F.relu(gate)


@op(
    elementwise=True,
    saves=("gate", "up"),
    extra=lambda gate, up, limit, alpha: 4 * _bytes(gate),
)
def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    """(clip(up, -limit, limit) + 1) * g * sigmoid(alpha * g), g = min(gate, limit) (gpt-oss)."""
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


@_gradient_of(clamped_swiglu)
def _(
    grad: Tensor, gate: Tensor, up: Tensor, limit: float, alpha: float
) -> tuple[Tensor, Tensor]:
    low, inside = gate.clamp(max=limit), up.clamp(-limit, limit)
    share = torch.sigmoid(low * alpha)
    slope = share * (1 + alpha * low * (1 - share))
    of_gate = (grad * (inside + 1) * slope).masked_fill(gate > limit, 0)
    return of_gate, (grad * (low * share)).masked_fill(up.abs() > limit, 0)


@op(elementwise=True, extra=_bytes)
def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(x).square()


@_gradient_of(relu2)
def _(grad: Tensor, x: Tensor) -> tuple[Tensor]:
    return (grad * (2 * F.relu(x)),)


@op(elementwise=True, saves=("x",))
def cubic(x: Tensor) -> Tensor:
    """x^3 (Chen et al. 2022, arXiv:2208.02813)."""
    return x**3


@_gradient_of(cubic)
def _(grad: Tensor, x: Tensor) -> tuple[Tensor]:
    return (grad * (3 * x**2),)


@op(elementwise=True)
def identity(x: Tensor) -> Tensor:
    """x itself: linear experts, as those of hierarchical mixtures."""
    return x


@_gradient_of(identity)
def _(grad: Tensor, x: Tensor) -> tuple[Tensor]:
    return (grad,)
