"""Rows grouped by expert, tiles over them and the way back, against the eager op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moegen.ops import routing
from moegen_triton.kernels import dispatch

EXPERTS = [1, 3, 128, 257]
SIZES = [(0, 2), (1, 1), (5, 3), (170, 3), (256, 4), (259, 3)]  # alone, and in chunks


def drawn(t: int, k: int, experts: int, how: str = "refused") -> Tensor:
    high = experts + (how == "refused")
    drawn = torch.randint(0, high, (t, k), generator=torch.Generator().manual_seed(t))
    return drawn.fill_(experts // 2) if how == "to one" else drawn


def tiles(ends: Tensor, block: int) -> list[tuple[int, int]]:
    """(expert, first row) of every tile, one after the other."""
    found, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        found += [(expert, row) for row in range(start, end, block)]
        start = end
    return found


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize(("t", "k"), SIZES)
def test_sorts_as_eager_does(t: int, k: int, experts: int) -> None:
    for how in ("refused", "kept", "to one"):
        choices = drawn(t, k, experts, how)
        order, ends = dispatch.sort_by_expert(choices, experts)
        want_order, want_ends = routing.sort_by_expert(choices, experts)
        assert order.dtype == want_order.dtype
        assert ends.dtype == want_ends.dtype
        assert torch.equal(order, want_order)
        assert torch.equal(ends, want_ends)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_takes_any_integers_in_any_layout(dtype: torch.dtype) -> None:
    choices = drawn(40, 8, 6).to(dtype)[::2, ::3]
    order, ends = dispatch.sort_by_expert(choices, 6)
    want = routing.sort_by_expert(choices.contiguous(), 6)
    assert torch.equal(order, want[0])
    assert torch.equal(ends, want[1])


@pytest.mark.parametrize("t", [20, 300])
def test_what_is_no_expert_is_nowhere(t: int) -> None:
    choices = drawn(t, 2, 4)
    odd = choices.masked_fill(choices == 4, -1)
    odd[1, 1] = 2**40 + 1
    choices[1, 1] = 4
    for got, want in zip(
        dispatch.sort_by_expert(odd, 4), routing.sort_by_expert(choices, 4), strict=True
    ):
        assert torch.equal(got, want)


def test_more_experts_than_fit_into_a_program() -> None:
    choices = drawn(30, 2, 5000)
    for got, want in zip(
        dispatch.sort_by_expert(choices, 5000), routing.sort_by_expert(choices, 5000), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize(("t", "k"), SIZES)
def test_load_counts_valid_tokens(t: int, k: int, experts: int) -> None:
    choices, valid = drawn(t, k, experts), torch.arange(t) % 3 != 1
    got = dispatch.expert_load(choices, experts, valid)
    want = routing.expert_load(choices, experts, valid)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("block", [16, 64])
def test_tiles_cover_every_expert(experts: int, block: int) -> None:
    for t, k in SIZES:
        for how in ("refused", "to one"):
            _, ends = routing.sort_by_expert(drawn(t, k, experts, how), experts)
            table = dispatch.tile_table(ends, t * k, block)
            assert table.dtype == torch.int32
            bound = t * k // block + min(experts, t * k)
            assert table.shape == (2, bound)
            want = tiles(ends, block)
            assert table.T[: len(want)].tolist() == [list(pair) for pair in want]
            assert (table[0, len(want) :] == -1).all()


def test_the_bound_of_tiles_is_reached() -> None:
    ends = torch.tensor([1, 18, 35], dtype=torch.int32)  # each a row more than whole tiles
    table = dispatch.tile_table(ends, 35, 16)
    assert table.tolist() == [[0, 1, 1, 2, 2], [0, 1, 17, 18, 34]]


def test_inverse() -> None:
    for total in (0, 1, 1500):
        order = torch.randperm(total)
        rows = dispatch.inverse(order)
        assert rows.dtype == torch.int32
        assert torch.equal(rows[order], torch.arange(total, dtype=torch.int32))


def test_ops_are_sound() -> None:
    choices, valid = drawn(7, 3, 5), torch.ones(7, dtype=torch.bool)
    torch.library.opcheck(dispatch._sort, (choices, 5))
    torch.library.opcheck(dispatch._load, (choices, 5, valid))


def test_compiles_whole() -> None:
    def both(choices: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        order, ends = dispatch.sort_by_expert(choices + 1, 6)
        return order, ends, dispatch.expert_load(choices, 6, valid)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (5, 9):
        choices, valid = drawn(t, 2, 5), torch.arange(t) > 2
        for got, want in zip(compiled(choices, valid), both(choices, valid), strict=True):
            assert torch.equal(got, want)
