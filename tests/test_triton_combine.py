"""Gathering rows and summing them back: against float64, the eager ops and torch's checkers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_errors import pulled, ratios

from moegen.ops import experts as eager
from moegen.ops.routing import sort_by_expert
from moegen_triton.kernels import combine as kernels
from moegen_triton.kernels.dispatch import inverse

EXPERTS, K = 5, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def order_of(t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return sort_by_expert(torch.randint(0, EXPERTS + 1, (t, K), generator=generator), EXPERTS)


def plain_gather(tokens: Tensor, order: Tensor) -> Tensor:
    return tokens[order // K]


def plain_combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    by_choice = rows[back].unflatten(0, weights.shape)
    return (by_choice * weights.to(rows.dtype).unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "d"), [(0, 8), (1, 1), (7, 33), (5, 300), (4, 1200)])
def test_near_to_float64(t: int, d: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    order, _ = order_of(t)
    tokens, rows = torch.randn(t, d).to(dtype), torch.randn(t * K, d).to(dtype)
    weights = torch.rand(t, K).to(dtype)
    slope = torch.randn(t * K, d).to(dtype)
    assert max(ratios(kernels.gather_rows, plain_gather, tokens, order, slopes=[slope])) <= 2
    inputs = rows, order, weights
    assert max(ratios(kernels.combine, plain_combine, *inputs, slopes=[slope[:t]])) <= 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_says_what_the_eager_ops_say(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    order, _ = order_of(9)
    tokens, rows, weights = torch.randn(9, 24), torch.randn(27, 24), torch.rand(9, K)
    gathered = kernels.gather_rows(tokens.to(dtype), order)
    assert torch.equal(gathered, eager.gather_rows(tokens.to(dtype), order))
    ours = pulled(kernels.combine, rows.to(dtype), order, weights, slopes=[tokens])
    theirs = pulled(eager.combine, rows.to(dtype), order, weights, slopes=[tokens])
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_weights_keep_their_own_format() -> None:
    torch.manual_seed(2)
    order, _ = order_of(6)
    rows, weights = torch.randn(18, 16).bfloat16(), torch.rand(6, K)
    found = pulled(kernels.combine, rows, order, weights, slopes=[torch.randn(6, 16)])
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_rows_of_no_expert_count_for_nothing() -> None:
    torch.manual_seed(3)
    order, ends = order_of(12)
    rows, weights = torch.randn(36, 20), torch.rand(12, K)
    end = int(ends[-1])
    zero = rows.clone()
    zero[end:] = 0
    rows[end:] = float("nan")
    refused = torch.zeros(36, dtype=torch.bool)
    refused[order[end:]] = True
    assert refused.any()
    weights = weights.masked_fill(refused.view(12, K), float("inf"))
    got = kernels.combine_rows_of_tokens(rows, inverse(order), ends, weights, 12)
    finite = weights.masked_fill(refused.view(12, K), 0)
    torch.testing.assert_close(got, plain_combine(zero, order, finite))
    got = kernels.combine_rows_of_tokens(rows, inverse(order), ends, None, 12)
    torch.testing.assert_close(got, plain_combine(zero, order, torch.ones(12, K)))


def test_nan_stays_with_its_token() -> None:
    order, _ = order_of(6)
    rows, weights = torch.ones(18, 8), torch.ones(6, K)
    rows[4] = float("nan")
    token = int(order[4]) // K
    out = kernels.combine(rows, order, weights)
    assert torch.isnan(out).any(1).nonzero().flatten().tolist() == [token]
    tokens = torch.ones(6, 8)
    tokens[token] = float("nan")
    mine = torch.isnan(kernels.gather_rows(tokens, order)).any(1)
    assert torch.equal(mine, order // K == token)


def test_other_layouts() -> None:
    torch.manual_seed(4)
    order, _ = order_of(5)
    wide, tall = torch.randn(15, 64), torch.randn(20, 15)
    weights = torch.rand(K, 5).t()
    slope = torch.randn(20, 5).t()
    for rows in (wide[:, :20], tall.t(), wide[:, ::2]):
        got = pulled(
            kernels.combine, rows, order, weights, slopes=[slope[:, :1].expand(5, rows.shape[1])]
        )
        want = pulled(
            plain_combine, rows, order, weights, slopes=[slope[:, :1].expand(5, rows.shape[1])]
        )
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)
    tokens = tall[:, :5].t()
    assert torch.equal(kernels.gather_rows(tokens, order), plain_gather(tokens, order))


def test_the_same_bits_every_time() -> None:
    torch.manual_seed(5)
    order, _ = order_of(8)
    inputs = torch.randn(24, 40).bfloat16(), order, torch.rand(8, K)
    slope = torch.randn(8, 40)
    once = pulled(kernels.combine, *inputs, slopes=[slope])
    again = pulled(kernels.combine, *inputs, slopes=[slope])
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def test_keeps_its_inputs_alone() -> None:
    order, _ = order_of(4)
    rows, weights = torch.randn(12, 8, requires_grad=True), torch.rand(4, K, requires_grad=True)
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kernels.combine(rows, order, weights)
        assert set(kept) == {rows.data_ptr(), order.data_ptr(), weights.data_ptr()}
        kept.clear()
        kernels.gather_rows(rows[:4], order)
        assert kept == [order.data_ptr()]


def test_only_wanted_gradients_are_computed() -> None:
    order, _ = order_of(4)
    for wants in ((True, False), (False, True)):
        rows = torch.randn(12, 8, requires_grad=wants[0])
        weights = torch.rand(4, K, requires_grad=wants[1])
        kernels.combine(rows, order, weights).sum().backward()
        assert (rows.grad is not None, weights.grad is not None) == wants


def test_refuses_float64() -> None:
    order, _ = order_of(2)
    with pytest.raises(TypeError, match="float64"):
        kernels.combine(torch.randn(6, 4).double(), order, torch.rand(2, K))


def test_ops_are_sound() -> None:
    order, _ = order_of(4)
    rows, weights = torch.randn(12, 8, requires_grad=True), torch.rand(4, K, requires_grad=True)
    tokens = torch.randn(4, 8, requires_grad=True)
    torch.library.opcheck(kernels._gather, (tokens, order))
    torch.library.opcheck(kernels._combine, (rows, order, weights))


def test_compiles_whole() -> None:
    def layer(tokens: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        return kernels.combine(kernels.gather_rows(tokens, order) * 2, order, weights)

    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    order, _ = order_of(6)
    inputs = torch.randn(6, 8), order, torch.rand(6, K)
    slopes = [torch.randn(6, 8)]
    got, want = (pulled(f, *inputs, slopes=slopes) for f in (compiled, layer))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
