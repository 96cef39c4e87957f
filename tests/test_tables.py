"""Tables by token id against worked cases and naive Python."""

from __future__ import annotations

from types import ModuleType

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moegen.emit.sources import ops_module
from moegen.ops.tables import (
    balanced_table,
    balanced_zipf_table,
    frequent_ids,
    random_table,
    visible_experts,
    visible_experts_by,
    zipf_frequencies,
)

quick = settings(deadline=None, max_examples=60)
counts = st.lists(st.integers(0, 9), max_size=30)


def test_zipf_frequencies_fall_with_the_id() -> None:
    assert zipf_frequencies(4).tolist() == [1, 1 / 2, 1 / 3, 1 / 4]
    assert zipf_frequencies(4).dtype == torch.float64


def test_random_table_is_even_and_known_by_its_seed() -> None:
    table = random_table(ids=64_000, experts=64, seed=3)
    assert (table.shape, table.dtype) == ((64_000,), torch.int64)
    load = torch.bincount(table, minlength=64)
    assert load.shape == (64,)
    assert (load - 1000).abs().max() < 200  # 6 standard deviations
    torch.manual_seed(1)
    assert torch.equal(table, random_table(64_000, 64, 3))
    assert not torch.equal(table, random_table(64_000, 64, 4))


def test_tables_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    random_table(100, 4, 0)
    visible_experts(100, 8, 4, 1, 0.5, 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_worked_cases(dtype: torch.dtype) -> None:
    frequencies = torch.tensor([50, 30, 10, 8, 6, 4, 2, 1], dtype=dtype)
    table = balanced_table(frequencies, 3)
    assert table.tolist() == [0, 1, 2, 2, 2, 2, 2, 1]
    loads = torch.zeros(3, dtype=dtype).index_add_(0, table, frequencies)
    assert loads.tolist() == [50, 31, 30]
    frequencies = torch.tensor([100, 60, 20, 10, 5, 3, 1, 1], dtype=dtype)
    assert frequent_ids(frequencies, 0.8).tolist() == [True] * 2 + [False] * 6


@given(frequencies=counts, experts=st.integers(1, 5))
@quick
def test_balanced_table_fills_the_least_loaded(frequencies: list[int], experts: int) -> None:
    expected, load = [0] * len(frequencies), [0] * experts
    for i in sorted(range(len(frequencies)), key=lambda i: (-frequencies[i], i)):
        expected[i] = load.index(min(load))
        load[expected[i]] += frequencies[i]
    table = balanced_table(torch.tensor(frequencies, dtype=torch.int64), experts)
    assert (table.tolist(), table.dtype) == (expected, torch.int64)


def test_balanced_zipf_table_is_even_for_a_large_vocabulary() -> None:
    frequencies, table = zipf_frequencies(130_000), balanced_zipf_table(130_000, 64)
    assert torch.equal(table, balanced_table(frequencies, 64))
    loads = torch.zeros(64, dtype=torch.float64).index_add_(0, table, frequencies)
    loads, _ = loads.sort(descending=True)
    assert loads[:4].tolist() == [1, 1 / 2, 1 / 3, 1 / 4]  # single ids above an expert's share
    assert loads[4] == 1 / 5
    assert loads[5] - loads[-1] < 1e-4


@given(
    frequencies=counts.filter(any),
    coverage=st.sampled_from([0.0, 0.1, 0.5, 0.75, 0.8, 0.999, 1.0]),
)
@quick
def test_frequent_ids_are_the_fewest_that_cover(frequencies: list[int], coverage: float) -> None:
    frequent = frequent_ids(torch.tensor(frequencies), coverage).tolist()
    covered = sum(f for f, often in zip(frequencies, frequent, strict=True) if often)
    assert covered / sum(frequencies) >= coverage
    if any(frequent):
        least = min(f for f, often in zip(frequencies, frequent, strict=True) if often)
        assert (covered - least) / sum(frequencies) < coverage
        rest = [f for f, often in zip(frequencies, frequent, strict=True) if not often]
        assert least >= max(rest, default=0)


def rows(visible: Tensor, frequencies: Tensor, coverage: float) -> tuple[set[int], set[int]]:
    """How many experts frequent ids see, and how many rare ones do."""
    often = frequent_ids(frequencies, coverage)
    return set(visible[often].sum(1).tolist()), set(visible[~often].sum(1).tolist())


def test_visible_experts_are_as_many_as_said_and_random() -> None:
    visible = visible_experts(ids=20_000, experts=16, frequent=8, rare=2, coverage=0.6, seed=0)
    assert (visible.shape, visible.dtype) == ((20_000, 16), torch.bool)
    assert rows(visible, zipf_frequencies(20_000), 0.6) == ({8}, {2})
    share = visible.float().mean(0)
    assert (share - share.mean()).abs().max() < 0.02
    pairs = (visible[:, :8].float().T @ visible[:, 8:].float()) / 20_000  # no pair is favoured
    assert pairs.max() < 2 * pairs.min()
    torch.manual_seed(1)
    assert torch.equal(visible, visible_experts(20_000, 16, 8, 2, 0.6, 0))
    assert not torch.equal(visible, visible_experts(20_000, 16, 8, 2, 0.6, 1))


def test_visible_experts_by_counts() -> None:
    frequencies = torch.tensor([1, 100, 3, 60, 20, 10, 5, 1])
    visible = visible_experts_by(frequencies, 6, frequent=6, rare=1, coverage=0.8, seed=0)
    assert visible.sum(1).tolist() == [1, 6, 1, 6, 1, 1, 1, 1]
    zipf = visible_experts_by(zipf_frequencies(50), 6, 3, 1, 0.5, 4)
    assert torch.equal(zipf, visible_experts(50, 6, 3, 1, 0.5, 4))


def test_no_ids_make_empty_tables() -> None:
    none = zipf_frequencies(0)
    assert none.shape == random_table(0, 4, 0).shape == balanced_zipf_table(0, 4).shape == (0,)
    assert frequent_ids(none, 0.5).shape == (0,)
    assert visible_experts(0, 4, 2, 1, 0.5, 0).shape == (0, 4)


MAKERS = [
    ("random_table", {"ids": 40, "experts": 4, "seed": 2}),
    ("balanced_zipf_table", {"ids": 40, "experts": 4}),
    (
        "visible_experts",
        {"ids": 40, "experts": 4, "frequent": 3, "rare": 1, "coverage": 0.5, "seed": 2},
    ),
]


@pytest.mark.parametrize(("name", "arguments"), MAKERS, ids=lambda x: str(x)[:20])
def test_copied_sources_stand_alone_on_any_device(name: str, arguments: dict[str, int]) -> None:
    expected = globals()[name](**arguments)
    text = ops_module({name})
    assert "moegen" not in text
    copy = ModuleType(name)
    exec(compile(text, name, "exec"), copy.__dict__)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):  # where a module that will be loaded is made
            made = copy.__dict__[name](**arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(made, expected)
