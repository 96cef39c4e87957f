"""Activations inside kernels: values, and derivatives for the backward pass.

A gated activation takes two projections, a plain one takes `gate` alone. All is float32.
NaN stays NaN, so comparisons are written such that NaN passes them.
"""

from typing import Any

import triton
import triton.language as tl

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "clamped_swiglu")
PLAIN = ("relu", "relu2", "gelu", "gelu_tanh", "silu", "cubic", "linear")


def kernel_name(activation: str, approximate: str = "none") -> str:
    """The name of an activation function inside kernels; both forms of GELU have one."""
    activation = "linear" if activation == "identity" else activation
    name = f"{activation}_tanh" if approximate == "tanh" else activation
    if name not in GATED + PLAIN:
        raise ValueError(f"there is no kernel for the activation {name!r}")
    return name


def is_gated(activation: str) -> bool:
    """Whether the activation, of whatever name, takes two projections."""
    return kernel_name(activation) in GATED


def constants(activation: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The compile-time arguments of a kernel: GATED, ACTIVATION, LIMIT and ALPHA.

    activation is a name of ops or of kernels; settings hold approximate, limit, alpha.
    """
    name = kernel_name(activation, settings.get("approximate", "none"))
    return {
        "GATED": is_gated(name),
        "ACTIVATION": name,
        "LIMIT": float(settings.get("limit", 7.0)),
        "ALPHA": float(settings.get("alpha", 1.702)),
    }


@triton.jit
def _relu(x):
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_derivative(x):
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density


@triton.jit
def _tanh_share(x):
    """(1 + tanh(u)) / 2 = sigmoid(2u), with u of the approximated GELU."""
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _gelu_tanh_derivative(x):
    share, rest = _tanh_share(x), _tanh_share(-x)  # 1 - share would lose digits
    slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
    return share + x * share * rest * slope


@triton.jit
def _silu_derivative(x):
    share = tl.sigmoid(x)
    return share * (1 + x * (1 - share))


@triton.jit
def _plain(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = _relu(x)
    elif ACTIVATION == "relu2":
        y = _relu(x) * _relu(x)
    elif ACTIVATION == "gelu":
        y = _gelu(x)
    elif ACTIVATION == "gelu_tanh":
        y = x * _tanh_share(x)
    elif ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "cubic":
        y = x * x * x
    else:
        tl.static_assert(ACTIVATION == "linear")
        y = x
    return y


@triton.jit
def _plain_derivative(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        slope = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        slope = 2 * _relu(x)
    elif ACTIVATION == "gelu":
        slope = _gelu_derivative(x)
    elif ACTIVATION == "gelu_tanh":
        slope = _gelu_tanh_derivative(x)
    elif ACTIVATION == "silu":
        slope = _silu_derivative(x)
    elif ACTIVATION == "cubic":
        slope = 3 * x * x
    else:
        tl.static_assert(ACTIVATION == "linear")
        slope = tl.full(x.shape, 1.0, tl.float32)
    return slope


@triton.jit
def _of_gate(x, ACTIVATION: tl.constexpr):
    """What a gated activation makes of the gate, and the derivative of that."""
    if ACTIVATION == "swiglu":
        y, slope = _plain(x, "silu"), _plain_derivative(x, "silu")
    elif ACTIVATION == "geglu":
        y, slope = _plain(x, "gelu"), _plain_derivative(x, "gelu")
    elif ACTIVATION == "geglu_tanh":
        y, slope = _plain(x, "gelu_tanh"), _plain_derivative(x, "gelu_tanh")
    else:
        tl.static_assert(ACTIVATION == "reglu")
        y, slope = _plain(x, "relu"), _plain_derivative(x, "relu")
    return y, slope


@triton.jit
def activate(
    gate,
    up,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
):
    """The hidden values; `up` is read by gated activations alone."""
    if ACTIVATION == "clamped_swiglu":
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        y = (up + 1) * (gate * tl.sigmoid(gate * ALPHA))
    elif GATED:
        y = _of_gate(gate, ACTIVATION)[0] * up
    else:
        y = _plain(gate, ACTIVATION)
    return y


@triton.jit
def activate_with_slopes(
    gate,
    up,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
):
    """The hidden values, their derivatives by gate and by up (for plain ones: 0)."""
    if ACTIVATION == "clamped_swiglu":
        low = tl.where(gate > LIMIT, LIMIT, gate)
        mid = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1
        share = tl.sigmoid(low * ALPHA)
        slope = share * (1 + ALPHA * low * (1 - share))
        y = mid * (low * share)
        by_gate = tl.where(gate > LIMIT, 0.0, mid * slope)
        by_up = tl.where((up > LIMIT) | (up < -LIMIT), 0.0, low * share)
    elif GATED:
        value, slope = _of_gate(gate, ACTIVATION)
        y = value * up
        by_gate = slope * up
        by_up = value
    else:
        y = _plain(gate, ACTIVATION)
        by_gate = _plain_derivative(gate, ACTIVATION)
        by_up = 0.0
    return y, by_gate, by_up
