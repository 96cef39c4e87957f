"""The routing ops against naive Python, with ties, masks, padding and NaN."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moegen.ops.places import position_in_expert
from moegen.ops.routing import expert_load, sort_by_expert, top_k

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EXPERTS = 4
choices = st.integers(1, 3).flatmap(
    lambda k: st.lists(
        st.lists(st.integers(0, EXPERTS), min_size=k, max_size=k), min_size=1, max_size=12
    )
)
# Few different values make ties likely; the rest are the awkward ones.
scores = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, float("-inf"), float("inf"), 1e-7, -3e4])
quick = settings(deadline=None, max_examples=60)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(row=st.lists(scores, min_size=1, max_size=9), data=st.data())
@quick
def test_ties_go_to_the_lowest_index(
    dtype: torch.dtype, row: list[float], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(row)))
    values = torch.tensor([row], dtype=dtype)
    rounded = values[0].tolist()
    expected = sorted(range(len(row)), key=lambda i: (-rounded[i], i))[:k]
    assert top_k(values, k).tolist() == [expected]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top_k_orders_scores_of_all_sizes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = (torch.randn(300, 40) * torch.logspace(-8, 4, 40)).to(dtype).requires_grad_()
    expected = torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :7]
    assert torch.equal(top_k(values, 7), expected)
    assert torch.equal(top_k(values.t(), 7), top_k(values.t().contiguous(), 7))
    assert top_k(values[:0], 7).shape == (0, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_scores_still_give_distinct_experts(dtype: torch.dtype) -> None:
    values = torch.full((3, 6), torch.nan, dtype=dtype)
    values[1, 2], values[2] = 1.0, torch.tensor([1, torch.nan, 2, -torch.nan, 3, 4])
    for row in top_k(values, 4).tolist():
        assert len(set(row)) == 4
        assert set(row) <= set(range(6))


@given(experts=choices)
@quick
def test_sorting_groups_choices_and_keeps_their_order(experts: list[list[int]]) -> None:
    flat = [e for row in experts for e in row]
    order, ends = sort_by_expert(torch.tensor(experts), EXPERTS)
    assert order.tolist() == sorted(range(len(flat)), key=lambda i: (flat[i], i))
    assert ends.tolist() == [sum(e <= i for e in flat) for i in range(EXPERTS)]
    assert (order.dtype, ends.dtype) == (torch.int64, torch.int32)


@given(experts=choices)
@quick
def test_positions_count_earlier_choices_rank_by_rank(experts: list[list[int]]) -> None:
    seen = [0] * (EXPERTS + 1)
    expected = [[0] * len(row) for row in experts]
    for rank in range(len(experts[0])):
        for token, row in enumerate(experts):
            expected[token][rank] = seen[row[rank]]
            seen[row[rank]] += 1
    actual = position_in_expert(torch.tensor(experts), EXPERTS).tolist()
    for row, a, b in zip(experts, actual, expected, strict=True):
        assert [x for e, x in zip(row, a, strict=True) if e < EXPERTS] == [
            x for e, x in zip(row, b, strict=True) if e < EXPERTS
        ]


@given(experts=choices, data=st.data())
@quick
def test_load_counts_choices_of_valid_tokens(experts: list[list[int]], data: st.DataObject) -> None:
    flags = st.lists(st.booleans(), min_size=len(experts), max_size=len(experts))
    valid = data.draw(flags)
    kept = [e for row, ok in zip(experts, valid, strict=True) if ok for e in row]
    load = expert_load(torch.tensor(experts), EXPERTS, torch.tensor(valid))
    assert load.tolist() == [kept.count(e) for e in range(EXPERTS)]


def route(scores: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
    experts = top_k(scores, 2)
    return (
        *sort_by_expert(experts, scores.shape[1]),
        position_in_expert(experts, scores.shape[1]),
        expert_load(experts, scores.shape[1], valid),
    )


def test_many_experts_and_no_tokens() -> None:
    order, ends = sort_by_expert(torch.tensor([[40_000, 7]]), 50_000)
    assert order.tolist() == [1, 0]
    assert ends[[6, 7, 39_999, 40_000]].tolist() == [0, 1, 1, 2]
    order, ends, position, load = route(torch.zeros(0, 3), torch.zeros(0, dtype=torch.bool))
    assert order.shape == (0,)
    assert position.shape == (0, 2)
    assert not ends.any()
    assert not load.any()


class Route(torch.nn.Module):
    def forward(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        return route(scores, valid)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routing_compiles_and_exports_for_any_number_of_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager", dynamic=True)
    inputs = torch.randn(10, 6).to(dtype), torch.rand(10) > 0.3
    tokens = torch.export.Dim("tokens", min=2)
    exported = torch.export.export(Route(), inputs, dynamic_shapes=({0: tokens}, {0: tokens}))
    for t in (10, 23):
        inputs = torch.randn(t, 6).to(dtype), torch.rand(t) > 0.3
        for run in (compiled, exported.module()):
            for actual, expected in zip(run(*inputs), route(*inputs), strict=True):
                assert torch.equal(actual, expected)
