"""Products of rows with their experts' matrices, as ops of torch on their own.

They stand where a layer's experts are no feed-forward network that is computed whole.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import check_formats, narrow
from .down import down
from .library import define
from .weight_gradient import bias_gradient, weight_gradient


@triton.jit
def add_bias_kernel(
    x, bias, expert, out, rows, width, experts, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x [N, width] + bias [E, width] at each row's expert; rows of no expert stay."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    owner = tl.load(expert + row, mask=row < rows, other=experts)
    added = inside & (owner < experts)[:, None]
    owner = owner.to(tl.int64)[:, None] * width + column[None, :]
    y += tl.load(bias + owner, mask=added, other=0.0).to(tl.float32)
    tl.store(out + at, narrow(y, out.dtype.element_ty), mask=inside)


def _linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    check_formats(rows, weight)
    return down(rows, weight, None, ends)


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return weight_gradient(left, right, None, 1, "none", ends)[0]


def _bias(rows: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    check_formats(rows, bias)
    rows, out = rows.contiguous(), rows.new_empty(rows.shape)
    if rows.numel() == 0:
        return out
    count, width = rows.shape
    place = torch.arange(count, dtype=ends.dtype, device=ends.device)
    expert = torch.searchsorted(ends, place, right=True, out_int32=True)
    grid = (triton.cdiv(count, 32), triton.cdiv(width, 128))
    add_bias_kernel[grid](
        rows, bias.contiguous(), expert, out, count, width, len(ends), BLOCK_M=32,
        BLOCK_N=128,
    )  # fmt: skip
    return out


def _linear_fake(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _outer_fake(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _bias_fake(rows: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


def _row_sum_fake(rows: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], rows.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _save_ends(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[-1])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, ends = ctx.saved_tensors
    wants_rows, wants_weight, _ = ctx.needs_input_grad
    return (
        _grouped_linear(grad, weight.transpose(1, 2), ends) if wants_rows else None,
        _grouped_outer(grad, rows, ends) if wants_weight else None,
        None,
    )


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    left, right, ends = ctx.saved_tensors
    wants_left, wants_right, _ = ctx.needs_input_grad
    return (
        _grouped_linear(right, grad, ends) if wants_left else None,
        _grouped_linear(left, grad.transpose(1, 2), ends) if wants_right else None,
        None,
    )


def _bias_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ends,) = ctx.saved_tensors
    wants_bias = ctx.needs_input_grad[1]
    return grad, _grouped_row_sum(grad, ends) if wants_bias else None, None


def _row_sum_save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.rows = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _row_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (ends,) = ctx.saved_tensors
    zeros = grad.new_zeros(ctx.rows, grad.shape[1])
    return _grouped_bias(zeros, grad, ends), None


_grouped_linear = define(
    __name__, "grouped_linear", _linear, _linear_fake, _save, _linear_backward
)
_grouped_outer = define(
    __name__, "grouped_outer", _outer, _outer_fake, _save, _outer_backward
)
_grouped_bias = define(
    __name__, "grouped_bias", _bias, _bias_fake, _save_ends, _bias_backward
)
_grouped_row_sum = define(
    __name__,
    "grouped_row_sum",
    bias_gradient,
    _row_sum_fake,
    _row_sum_save,
    _row_sum_backward,
)


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix: rows [N, d], weight [E, n, d] -> [N, n].

    Rows of no expert, from ends[-1] on, give zeros and get zero gradients, whatever they
    hold.
    """
    # Under autocast rows may come from a product in 16 bits.
    return _grouped_linear(rows.to(weight.dtype), weight, ends)  # type: ignore[no-any-return]


def grouped_bias(rows: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    """Add to each row the bias of its expert: rows [N, n], bias [E, n] -> [N, n]."""
    return _grouped_bias(rows.to(bias.dtype), bias, ends)  # type: ignore[no-any-return]
