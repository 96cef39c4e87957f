"""Balanced assignment against enumeration, the Hungarian algorithm, and the absence of gains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import ModuleType

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import moegen.ops.assignment as ops
from moegen.emit.sources import ops_module
from moegen.ops.assignment import balanced_assignment

quick = settings(deadline=None, max_examples=100)
INF, NAN = math.inf, math.nan
AWKWARD = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-7, 1e4, -1e4, -INF, INF, NAN]


def counts_are_even(experts: Tensor, tokens: int, number: int) -> None:
    assert (experts.shape, experts.dtype) == ((tokens, 1), torch.int64)
    counts = torch.bincount(experts.flatten(), minlength=number)
    assert counts.shape == (number,)
    assert counts.sum() == tokens
    if tokens:
        assert counts.min() >= tokens // number
        assert counts.max() <= -(-tokens // number)


def total(scores: Tensor, experts: Tensor) -> float:
    return math.fsum(scores.double().gather(1, experts).flatten().tolist())


def enumerated(value: Callable[[int, int], Tensor], tokens: int, number: int) -> tuple[float, ...]:
    """The highest sum over all even assignments, of values that are compared part by part."""
    low, high = tokens // number, -(-tokens // number)
    best: tuple[float, ...] = ()
    for experts in itertools.product(range(number), repeat=tokens):
        if all(low <= experts.count(e) <= high for e in range(number)):
            parts = [value(t, e).tolist() for t, e in enumerate(experts)]
            best = max(best, tuple(math.fsum(part) for part in zip(*parts, strict=True)))
    return best


def hungarian(gain: np.ndarray) -> float:
    """The highest total of a square matrix, one entry of each row and column, by shortest paths."""
    n = len(gain)
    cost = np.zeros((n + 1, n + 1))
    cost[1:, 1:] = -gain
    u, v, match = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1, dtype=int)
    for row in range(1, n + 1):
        match[0], column = row, 0
        far, came, used = np.full(n + 1, INF), np.zeros(n + 1, dtype=int), np.zeros(n + 1, bool)
        while True:
            used[column] = True
            reduced = cost[match[column]] - u[match[column]] - v
            better = ~used & (reduced < far)
            better[0] = False
            far[better], came[better] = reduced[better], column
            following = 1 + int(np.where(used, INF, far)[1:].argmin())
            step = far[following]
            u[match[used]] += step
            v[used] -= step
            far[~used] -= step
            column = following
            if match[column] == 0:
                break
        while column:
            match[column] = match[came[column]]
            column = came[column]
    return math.fsum(gain[match[j] - 1, j - 1] for j in range(1, n + 1))


def best_total(scores: Tensor) -> float:
    """The optimum, with a column for every place and tokens that fill the places left over."""
    (tokens, number), values = scores.shape, scores.double().numpy()
    whole, rest = divmod(tokens, number)
    gain = np.repeat(values, whole, axis=1)
    if rest:
        fill = np.zeros((number - rest, number * (whole + 1)))
        fill[:, : number * whole] = -1e7  # only the last place of an expert may stay free
        gain = np.concatenate([np.concatenate([gain, values], 1), fill])
    return hungarian(gain)


def gain_of_moves(scores: Tensor, experts: Tensor) -> float:
    """The most that any closed chain of moves gains (Floyd, Warshall): 0 for an optimum only."""
    number, values, owner = scores.shape[1], scores.double(), experts.flatten()
    loss = torch.stack(
        [
            (values[owner == e, e, None] - values[owner == e]).amin(0)
            if (owner == e).any()
            else torch.full((number,), INF, dtype=torch.float64)
            for e in range(number)
        ]
    )
    counts = torch.bincount(owner, minlength=number)
    fewer = counts < -(-len(owner) // number)
    # An expert with a free place may hand it to one without, which costs nothing.
    loss = torch.where(fewer[:, None] & ~fewer, loss.clamp(max=0), loss)
    for e in range(number):
        loss = torch.minimum(loss, loss[:, e, None] + loss[e])
    return max(0.0, -loss.diagonal().min().item())


def span(scores: Tensor) -> float:
    values = scores.double()
    return (values.amax(1) - values.amin(1)).max().item() if len(values) else 0.0


def instances(tokens: int, number: int, seed: int) -> dict[str, Tensor]:
    """Score matrices of many kinds: spread, tied, collapsed, and hard for an auction."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    collapsed = torch.zeros(number)
    collapsed[0] = 10
    cluster = (uniform(tokens) ** 3 * number).long()
    chain = torch.full((tokens, number), -1e4)
    chain[torch.arange(tokens), cluster] = normal(tokens)
    chain[torch.arange(tokens), (cluster + 1).clamp(max=number - 1)] = normal(tokens)
    place = torch.arange(tokens).unsqueeze(1)
    masked = normal(tokens, number).masked_fill(uniform(tokens, number) < 0.3, -1e4)
    return {
        "normal": normal(tokens, number),
        "collapsed": normal(tokens, number) * 0.01 + collapsed,
        "collapsed softmax": torch.softmax(normal(tokens, number) + collapsed, -1),
        "equal": torch.ones(tokens, number),
        "equal tokens": normal(1, number).expand(tokens, number),
        "nearly equal tokens": normal(1, number) + 1e-6 * normal(tokens, number),
        "equal experts": normal(tokens, 1).expand(tokens, number),
        "few values": (uniform(tokens, number) * 3).floor(),
        "few ones": (uniform(tokens, number) < 0.1).float(),
        "bfloat16": normal(tokens, number).bfloat16(),
        "masked": masked,
        "one direction": normal(tokens, 1) @ normal(1, number),
        "staircase": (place * torch.arange(number)).float(),
        "clusters": normal(number, number)[cluster] + 0.01 * normal(tokens, number),
        "repeated tokens": normal(number, number)[cluster],
        "chain": chain,
        "distances": -(uniform(tokens, 1) - uniform(1, number)).abs(),
        "geometric": 0.5 ** torch.arange(number).double() * uniform(tokens, 1).double(),
        "heavy tails": normal(tokens, number) / normal(tokens, number),
    }


KINDS = list(instances(2, 2, 0))


@pytest.mark.parametrize(
    ("scores", "expected", "sum_of_scores"),
    [
        ([[3, 1], [2.5, 2], [2, 0.5], [1, 0.9]], [0, 1, 0, 1], 7.9),
        (
            [
                *([2, 1, 0.5], [1.9, 1.85, 0.1], [1.5, 0.2, 0.4]),
                *([1.4, 1.3, 1.22], [0.3, 0.95, 0.8], [0.2, 0.1, 0.6]),
            ],
            [0, 1, 0, 2, 1, 2],
            8.12,
        ),
    ],
)
def test_worked_cases(scores: list[list[float]], expected: list[int], sum_of_scores: float) -> None:
    values = torch.tensor(scores)
    experts = balanced_assignment(values)
    assert experts.flatten().tolist() == expected
    assert total(values, experts) == pytest.approx(sum_of_scores, abs=1e-6)


@given(data=st.data(), tokens=st.integers(1, 6), number=st.integers(1, 3))
@quick
def test_no_even_assignment_is_better(data: st.DataObject, tokens: int, number: int) -> None:
    row = st.lists(st.sampled_from(AWKWARD), min_size=number, max_size=number)
    rows = data.draw(st.lists(row, min_size=tokens, max_size=tokens))
    scores = torch.tensor(rows, dtype=torch.float64)
    experts = balanced_assignment(scores)
    counts_are_even(experts, tokens, number)
    # First as few -inf and as many inf as there can be, then the highest sum of the rest.
    known = scores.isfinite()
    low = scores.masked_fill(~known, INF).amin(1, keepdim=True)
    top = scores.masked_fill(~known, -INF).amax(1, keepdim=True)
    low, top = (x.masked_fill(x.isinf(), 0.0) for x in (low, top))
    value = torch.where(known, scores, torch.where(scores == INF, top, low))
    both = torch.stack([torch.sign(scores) * scores.isinf(), value], -1).nan_to_num(0.0)
    best = enumerated(lambda t, e: both[t, e], tokens, number)
    actual = both[torch.arange(tokens), experts.flatten()]
    assert actual[:, 0].sum() == best[0]
    assert actual[:, 1].sum().item() == pytest.approx(best[1], abs=tokens * 1e-12 * 2e4)


@pytest.mark.parametrize(("tokens", "number"), [(48, 4), (50, 7), (5, 8), (9, 8), (40, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_total_is_the_optimum(kind: str, tokens: int, number: int) -> None:
    for seed in range(4):
        scores = instances(tokens, number, seed)[kind]
        experts = balanced_assignment(scores)
        counts_are_even(experts, tokens, number)
        best = best_total(scores)
        rounding = 1e-14 * abs(best) + 1e-8 * (tokens % number > 0)  # of the Hungarian algorithm
        bound = tokens * 1e-12 * span(scores)
        assert abs(total(scores, experts) - best) <= bound + rounding


@pytest.mark.parametrize(("tokens", "number"), [(1024, 8), (1000, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_chain_of_moves_gains(kind: str, tokens: int, number: int) -> None:
    scores = instances(tokens, number, 7)[kind]
    experts = balanced_assignment(scores)
    counts_are_even(experts, tokens, number)
    assert gain_of_moves(scores, experts) <= number * 1e-12 * span(scores)


@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 40), number=st.integers(2, 9))
@quick
def test_any_prices_lead_to_the_optimum(seed: int, tokens: int, number: int) -> None:
    for scores in instances(tokens, number, seed).values():
        values, width = ops._finite(scores)
        price = torch.randn(number, generator=torch.Generator().manual_seed(seed)).double()
        owner, _, even = ops._settle(values, width * price, 1e-12 * width, tokens)
        assert even
        counts_are_even(owner.unsqueeze(1), tokens, number)
        assert gain_of_moves(values, owner) <= number * 2e-12 * max(width, 1e-300)


def test_the_auction_leaves_little_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[int] = []
    search = ops._cheapest

    def counted(costs: Tensor, excess: Tensor) -> tuple[list[int], Tensor]:
        ways.append(1)
        return search(costs, excess)

    monkeypatch.setattr(ops, "_cheapest", counted)
    for kind, scores in instances(2000, 8, 5).items():
        ways.clear()
        ops._assigned(scores)
        assert len(ways) <= (16 if kind == "normal" else 200), kind


@pytest.mark.parametrize("tokens", [0, 1, 3, 7, 8, 9])
@pytest.mark.parametrize("number", [1, 2, 8])
@pytest.mark.parametrize("odd", [NAN, INF, -INF, 1e308, -1e308, 0.0, 5e-324], ids=str)
def test_odd_scores_are_shared_out_too(tokens: int, number: int, odd: float) -> None:
    torch.manual_seed(0)
    scores = torch.randn(tokens, number, dtype=torch.float64)
    for part in (0.0, 0.5, 1.0):
        mixed = scores.masked_fill(torch.rand(tokens, number) < part, odd)
        counts_are_even(balanced_assignment(mixed), tokens, number)
        mixed[::2] = odd
        counts_are_even(balanced_assignment(mixed), tokens, number)
        counts_are_even(balanced_assignment(odd * scores), tokens, number)


def test_infinities_are_avoided_at_any_price() -> None:
    scores = torch.tensor([[1e4, 0.0], [0.0, -INF], [-1e4, 0.0], [0.0, 0.0]])
    assert balanced_assignment(scores).flatten().tolist() == [0, 0, 1, 1]
    scores[3, 1] = NAN
    assert balanced_assignment(scores).flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_every_format_layout_and_offset(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = torch.randn(90, 8).to(dtype)
    experts = balanced_assignment(scores)
    assert total(scores, experts) == pytest.approx(best_total(scores), abs=1e-6)
    assert torch.equal(balanced_assignment(scores.double()), experts)
    assert torch.equal(balanced_assignment(scores.t().contiguous().t()), experts)
    offset = torch.randn(90, 1).double() * 100  # what is added to all scores of a token is nothing
    moved = balanced_assignment(scores.double() + offset)
    assert total(scores, moved) == pytest.approx(total(scores, experts), abs=1e-9)


def test_is_the_same_every_time_and_has_no_gradient() -> None:
    for scores in instances(300, 8, 3).values():
        known = scores.clone().requires_grad_()
        first = balanced_assignment(known)
        assert not first.requires_grad
        assert torch.equal(first, balanced_assignment(known))
        assert torch.equal(known.detach(), scores)


def test_minds_no_default_of_torch() -> None:
    scores = torch.randn(50, 4)
    expected = balanced_assignment(scores)
    torch.set_default_dtype(torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("meta"):
            assert torch.equal(balanced_assignment(scores), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def test_library_op_passes_opcheck() -> None:
    for scores in (torch.randn(12, 4), torch.randn(0, 4), torch.randn(6, 1).bfloat16()):
        torch.library.opcheck(
            torch.ops.moegen.balanced_assignment, (scores, torch.ones(scores.shape[0]) > 0)
        )


class Routed(torch.nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores).gather(1, balanced_assignment(scores)).sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_and_exports_for_any_number_of_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(Routed(), fullgraph=True, backend="aot_eager", dynamic=True)
    free = ({0: torch.export.Dim("tokens", min=2)},)
    inputs = (torch.randn(12, 4, dtype=dtype),)
    exported = torch.export.export(Routed(), inputs, dynamic_shapes=free).module()
    for tokens in (12, 30):
        scores = torch.randn(tokens, 4, dtype=dtype, requires_grad=True)
        expected = Routed()(scores)
        actual = compiled(scores)
        assert torch.equal(actual, expected)
        assert torch.equal(exported(scores), expected)
        (grad,) = torch.autograd.grad(actual, scores)
        assert torch.equal(grad, torch.autograd.grad(expected, scores)[0])
        assert (grad != 0).sum() == tokens


# Inductor's own imports use deprecated parts of torch.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_with_inductor() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    scores = torch.randn(30, 4)
    torch.testing.assert_close(torch.compile(Routed(), fullgraph=True)(scores), Routed()(scores))


def test_copies_of_the_source_stand_alone_and_side_by_side() -> None:
    scores = torch.randn(20, 4)
    text = ops_module({"balanced_assignment"})
    assert "moegen.ops" not in text.replace("torch.ops.moegen", "")
    for name in ("first", "second"):
        copy = ModuleType(name)
        exec(compile(text, name, "exec"), copy.__dict__)
        assert torch.equal(copy.balanced_assignment(scores), balanced_assignment(scores))
        assert torch.equal(copy._assigned(scores), balanced_assignment(scores))


def test_padding_takes_no_place() -> None:
    """Real tokens are as even as if the others were not there, and as well placed."""
    chance = torch.Generator().manual_seed(2)
    scores = torch.randn(24, 4, generator=chance)
    valid = torch.rand(24, generator=chance) < 0.5
    owner = balanced_assignment(scores, valid)[valid]
    assert torch.equal(owner, balanced_assignment(scores[valid]))
    counts = torch.bincount(owner[:, 0], minlength=4)
    assert counts.max() - counts.min() <= 1
    assert balanced_assignment(scores, torch.zeros(24, dtype=torch.bool)).shape == (24, 1)
