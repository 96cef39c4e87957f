"""Activations as ops: gradients by hand are autograd's, and kernels know every one of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.arch.activation import Activation
from moegen.ops import activations as act
from moegen.ops.activations import _GRADIENTS, _pull
from moegen_triton.fusions import ACTIVATIONS
from moegen_triton.kernels.activations import GATED, kernel_name

CASES: dict[str, tuple[Callable[..., Any], int, dict[str, Any]]] = {
    "swiglu": (act.swiglu, 2, {}),
    "geglu": (act.geglu, 2, {}),
    "geglu by tanh": (act.geglu, 2, {"approximate": "tanh"}),
    "reglu": (act.reglu, 2, {}),
    "clamped": (act.clamped_swiglu, 2, {"limit": 1.5, "alpha": 1.702}),
    "relu": (F.relu, 1, {}),
    "relu2": (act.relu2, 1, {}),
    "gelu": (F.gelu, 1, {}),
    "gelu by tanh": (F.gelu, 1, {"approximate": "tanh"}),
    "silu": (F.silu, 1, {}),
    "cubic": (act.cubic, 1, {}),
    "identity": (act.identity, 1, {}),
}


def inputs(count: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    edges = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1.5, -1.5, 40.0, -40.0])
    return tuple(
        torch.cat([2 * torch.randn(200), edges.roll(i)]).double().requires_grad_()
        for i in range(count)
    )


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_hand_are_those_of_autograd(name: str) -> None:
    function, count, settings = CASES[name]
    given = inputs(count)
    out, pull = _pull(partial(function, **settings), given)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(function(*given, **settings), given, grad)
    for a, b in zip(pull(grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_activation_without_a_gradient_by_hand_has_one_all_the_same() -> None:
    (x,) = inputs(1)
    out, pull = _pull(partial(torch.tanh), (x,))
    (found,) = pull(torch.ones_like(out))
    torch.testing.assert_close(found, 1 - torch.tanh(x) ** 2)


def test_every_activation_of_the_language_has_both() -> None:
    functions = {getattr(f, "op", f) for f in _GRADIENTS}
    assert {getattr(f, "op", f) for f, _, _ in CASES.values()} == functions
    kernels = {kernel_name(f.__name__) for f, _, _ in CASES.values()}
    assert kernels == {kernel_name(name) for name in ACTIVATIONS}
    assert {f.__name__ for f, count, _ in CASES.values() if count == 2} == {
        name.removesuffix("_tanh") for name in GATED
    }
    assert len(Activation.members) == len(ACTIVATIONS)
