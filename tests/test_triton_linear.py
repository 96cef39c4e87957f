"""Grouped products and biases as ops on Triton, beside the eager ops of the same meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moegen.ops import experts as eager
from moegen_triton.kernels import linear

# NumPy warns of what kernels compute with NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

#: Where the rows of three experts end; the second has none, and two rows have no expert.
ENDS = torch.tensor([4, 4, 9], dtype=torch.int32)
ROWS, D, N = 11, 12, 7
Op = Callable[[Tensor, Tensor, Tensor], Tensor]
OPS = {"grouped_linear": (D, (N, D)), "grouped_bias": (N, (N,))}


def inputs(name: str, dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Rows and parameters; rows of no expert hold NaN where it may not matter."""
    draw = torch.Generator().manual_seed(3)
    width, shape = OPS[name]
    x = torch.randn(rows, width, generator=draw)
    if name == "grouped_linear":
        x[int(ENDS[-1]) :] = float("nan")
    parameter = torch.randn(len(ENDS), *shape, generator=draw)
    return x.to(dtype).requires_grad_(), parameter.to(dtype).requires_grad_()


def results(run: Op, *leaves: Tensor) -> list[Tensor]:
    """The output, gradients, and gradients of a number made of the gradients."""
    out = run(*leaves, ENDS[: len(leaves[1])])
    draw = torch.Generator().manual_seed(4)
    slope = torch.randn(out.shape, generator=draw).to(out.dtype).requires_grad_()
    first = torch.autograd.grad(out, leaves, slope, create_graph=True)
    whole = sum((x * x).sum() for x in first)
    seconds = torch.autograd.grad(whole, (*leaves, slope), allow_unused=True)
    found = [out, *first, *seconds]
    return [torch.zeros(()) if x is None else x.detach() for x in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_ops_mean_what_the_eager_ones_do(name: str, dtype: torch.dtype) -> None:
    leaves = inputs(name, dtype)
    exact = results(getattr(eager, name), *(x.detach().double().requires_grad_() for x in leaves))
    usual = results(getattr(eager, name), *leaves)
    for ours, theirs, right in zip(
        results(getattr(linear, name), *leaves), usual, exact, strict=True
    ):
        assert ours.shape == right.shape
        assert ours.dtype == theirs.dtype
        error, bound = ((x.double() - right).norm() for x in (ours, theirs))
        least = torch.finfo(dtype).eps / 16 * right.norm()
        assert float(error) <= 2 * float(bound) + float(least)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", OPS)
def test_ops_on_few_rows(name: str, rows: int) -> None:
    leaves = [x.detach()[:rows] if i == 0 else x for i, x in enumerate(inputs(name, torch.float32))]
    leaves[0].requires_grad_()
    ends = ENDS.clamp(max=rows)
    out = getattr(linear, name)(*leaves, ends)
    expected = getattr(eager, name)(*leaves, ends)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", OPS)
def test_ops_are_sound_for_torch(name: str) -> None:
    rows, parameter = inputs(name, torch.float32)
    rows = rows.detach().nan_to_num().requires_grad_()
    space = getattr(torch.ops, linear.__name__.replace(".", "_"))
    torch.library.opcheck(getattr(space, name), (rows, parameter, ENDS))


def test_ops_of_gradients_are_sound_for_torch() -> None:
    space = getattr(torch.ops, linear.__name__.replace(".", "_"))
    left, right = torch.randn(ROWS, N, requires_grad=True), torch.randn(ROWS, D, requires_grad=True)
    torch.library.opcheck(space.grouped_outer, (left, right, ENDS))
    torch.library.opcheck(space.grouped_row_sum, (left, ENDS))


def both(rows: Tensor, weight: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    return linear.grouped_bias(linear.grouped_linear(rows, weight, ends), bias, ends)


def test_ops_compile_whole() -> None:
    rows, weight = inputs("grouped_linear", torch.float32)
    bias = inputs("grouped_bias", torch.float32)[1]
    leaves = (rows, weight, bias)
    found = []
    for run in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        out = run(*leaves, ENDS)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(map(torch.equal, *found))


def test_parameters_may_be_strided() -> None:
    rows, weight = inputs("grouped_linear", torch.float32)
    turned = weight.detach().transpose(1, 2).contiguous().transpose(1, 2)
    expected = linear.grouped_linear(rows, weight, ENDS)
    assert torch.equal(linear.grouped_linear(rows, turned, ENDS), expected)
    apart = rows.detach().repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(linear.grouped_linear(apart, weight, ENDS), expected)
    rows, bias = inputs("grouped_bias", torch.float32)
    expected = linear.grouped_bias(rows, bias, ENDS)
    apart = rows.detach().repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(linear.grouped_bias(apart, bias, ENDS), expected)


@pytest.mark.parametrize("name", OPS)
def test_formats_that_kernels_lack_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="float64"):
        getattr(linear, name)(*inputs(name, torch.float64), ENDS)


def test_rows_take_the_format_of_parameters() -> None:
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16}
    rows, weight = inputs("grouped_linear", torch.float32)
    out = linear.grouped_linear(rows.detach().to(**kwargs), weight, ENDS)
    assert out.dtype == torch.float32
