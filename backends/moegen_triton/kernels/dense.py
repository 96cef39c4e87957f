"""Gated activations of dense feed-forward networks: one pass forward, one backward.

The backward pass keeps the two inputs alone. They may be halves of one tensor, as chunk gives
them: rows that lie apart are read where they are.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_with_slopes, constants
from .device import check_formats, narrow
from .library import define

WIDTH = 1024  # most columns of a program
SIZE = 1024  # most values of a program: eight a thread, so that many programs fit


@triton.jit
def _forward_kernel(
    gate,
    up,
    out,
    rows,
    width,
    gate_stride,
    up_stride,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program takes ROWS by COLUMNS values."""
    parts = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % parts) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    here = (row < rows) & (column < width)
    g = tl.load(gate + row * gate_stride + column, mask=here, other=0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=here, other=0).to(tl.float32)
    value = activate(g, u, GATED, ACTIVATION, LIMIT, ALPHA)
    value = narrow(value, out.dtype.element_ty)
    tl.store(out + row * width + column, value, mask=here)


@triton.jit
def _backward_kernel(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    rows,
    width,
    grad_stride,
    gate_stride,
    up_stride,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Both gradients of ROWS by COLUMNS values."""
    parts = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % parts) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    here = (row < rows) & (column < width)
    slope = tl.load(grad + row * grad_stride + column, mask=here, other=0)
    g = tl.load(gate + row * gate_stride + column, mask=here, other=0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=here, other=0).to(tl.float32)
    # fmt: off
    _, by_gate, by_up = activate_with_slopes(
        g, u, GATED, ACTIVATION, LIMIT, ALPHA
    )
    # fmt: on
    slope, at = slope.to(tl.float32), row * width + column
    by_gate = narrow(slope * by_gate, grad_gate.dtype.element_ty)
    tl.store(grad_gate + at, by_gate, mask=here)
    by_up = narrow(slope * by_up, grad_up.dtype.element_ty)
    tl.store(grad_up + at, by_up, mask=here)


def _rows(x: Tensor) -> Tensor:
    """x as rows [N, n], a view wherever it can be one."""
    x = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _blocks(rows: int, width: int) -> tuple[int, dict[str, int]]:
    """How many programs there are, and what each takes."""
    columns = min(WIDTH, max(16, int(triton.next_power_of_2(width))))
    height = min(SIZE // columns, int(triton.next_power_of_2(rows)))
    programs = triton.cdiv(rows, height) * triton.cdiv(width, columns)
    return programs, {"ROWS": height, "COLUMNS": columns}


def _forward(
    gate: Tensor, up: Tensor, activation: str, limit: float, alpha: float
) -> Tensor:
    check_formats(gate, up)
    out = _forward_fake(gate, up, activation, limit, alpha)
    if out.numel():
        gate, up = _rows(gate), _rows(up)
        programs, blocks = _blocks(*gate.shape)
        settings = constants(activation, {"limit": limit, "alpha": alpha})
        strides = (gate.stride(0), up.stride(0))
        _forward_kernel[(programs,)](
            gate, up, out, *gate.shape, *strides, **settings, **blocks
        )
    return out


def _forward_fake(
    gate: Tensor, up: Tensor, activation: str, limit: float, alpha: float
) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    limit: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    out = _backward_fake(grad, gate, up, activation, limit, alpha)
    if gate.numel():
        grad, gate, up = _rows(grad), _rows(gate), _rows(up)
        programs, blocks = _blocks(*gate.shape)
        settings = constants(activation, {"limit": limit, "alpha": alpha})
        strides = (grad.stride(0), gate.stride(0), up.stride(0))
        _backward_kernel[(programs,)](
            grad, gate, up, *out, *gate.shape, *strides, **settings, **blocks
        )
    return out


def _backward_fake(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    limit: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *ctx.settings = inputs
    ctx.save_for_backward(gate, up)


def _pull(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    found = _gradient(grad, *ctx.saved_tensors, *ctx.settings)
    return (*found, None, None, None)


_gradient = define(__name__, "gated_gradient", _backward, _backward_fake)
_gated = define(__name__, "gated", _forward, _forward_fake, _save, _pull)


def _apply(
    gate: Tensor, up: Tensor, activation: str, limit: float = 0.0, alpha: float = 0.0
) -> Tensor:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"{activation} takes two tensors of one shape and format, not "
            f"{gate.dtype} {list(gate.shape)} and {up.dtype} {list(up.shape)}"
        )
    return _gated(gate, up, activation, limit, alpha)  # type: ignore[no-any-return]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of any one shape (Shazeer 2020, arXiv:2002.05202)."""
    return _apply(gate, up, "swiglu")


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up; approximate: none or tanh (Shazeer 2020)."""
    return _apply(gate, up, "geglu_tanh" if approximate == "tanh" else "geglu")


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) * up (Shazeer 2020)."""
    return _apply(gate, up, "reglu")


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    """(clip(up, -limit, limit) + 1) * g * sigmoid(alpha * g), g = min(gate, limit) (gpt-oss)."""
    return _apply(gate, up, "clamped_swiglu", limit, alpha)
