"""Gradients of routed experts on Triton, against float64 and beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton_cases import ACTIVATIONS

from moegen_triton.kernels.activations import is_gated
from moegen_triton.kernels.hidden_gradient import hidden_gradient
from moegen_triton.kernels.tiles import Tile, pinned
from moegen_triton.kernels.weight_gradient import bias_gradient, weight_gradient

SHORT = (torch.bfloat16, torch.float16)
# NumPy warns of what kernels compute with NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

#: Rows of four experts, the second of which has none; those left over are routed nowhere.
COUNTS = (9, 0, 19, 1)


#: Tiles that are fewer than those of the interpreter, and still several.
HIDDEN = Tile(16, 32, 16, sub=2)
WEIGHT = Tile(32, 32, 16)


@pytest.fixture(autouse=True)
def _few_tiles() -> Iterator[None]:
    with pinned(hidden_gradient=HIDDEN, weight_gradient=WEIGHT):
        yield


class Case(NamedTuple):
    """Arguments of hidden_gradient, in float64; weights of None are ones."""

    grad: Tensor
    order: Tensor
    weights: Tensor | None
    ends: Tensor
    down: Tensor
    bias: Tensor | None
    hidden: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        parts = (x if x is None or not x.is_floating_point() else x.to(dtype) for x in self)
        return Case(*parts)

    @property
    def token(self) -> Tensor:
        return self.order // (len(self.order) // len(self.grad))


def case(
    dtype: torch.dtype = torch.float32,
    *,
    counts: tuple[int, ...] = COUNTS,
    tokens: int = 17,
    choices: int = 2,
    d: int = 37,
    n: int = 21,
    gates: bool = True,
    weighted: bool = True,
    biased: bool = False,
) -> Case:
    """Numbers that dtype can hold, drawn anew but always the same."""
    draw = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    rows = tokens * choices
    exact = Case(
        grad=normal(tokens, d),
        order=torch.randperm(rows, generator=draw),
        weights=normal(tokens, choices) if weighted else None,
        ends=torch.tensor(counts).cumsum(0).to(torch.int32),
        down=normal(len(counts), d, n) / d**0.5,
        bias=normal(len(counts), d) if biased else None,
        hidden=normal(rows, 2 * n if gates else n),
    )
    return exact.to(dtype).to(torch.float64)


def gated(name: str) -> bool:
    return is_gated(ACTIVATIONS[name][0].__name__)


def spans(ends: Tensor) -> list[slice]:
    stops = ends.tolist()
    return [slice(*span) for span in zip([0, *stops], stops, strict=False)]


def plain(x: Case, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """What hidden_gradient gives, by autograd of one expert after the other."""
    function, settings = ACTIVATIONS[name]
    d_hidden = torch.zeros_like(x.hidden)
    active = x.hidden.new_zeros(len(x.hidden), x.down.shape[2])
    d_weights = None if x.weights is None else torch.zeros_like(x.weights)
    for expert, span in enumerate(spans(x.ends)):
        hidden = x.hidden[span].clone().requires_grad_()
        parts = hidden.chunk(2, -1) if gated(name) else (hidden,)
        values = function(*parts, **settings)
        y = values @ x.down[expert].T
        y = y if x.bias is None else y + x.bias[expert]
        share = hidden.new_ones(len(hidden))
        if x.weights is not None:
            share = x.weights.flatten()[x.order[span]]
        share = share.clone().requires_grad_()
        grads = torch.autograd.grad(y * share[:, None], (hidden, share), x.grad[x.token[span]])
        d_hidden[span], active[span] = grads[0], values * share[:, None]
        if d_weights is not None:
            d_weights.view(-1)[x.order[span]] = grads[1]
    return d_hidden.detach(), active.detach(), d_weights


def launch(x: Case, name: str, **how: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden_gradient, with zeros for the rows that it does not write."""
    k = len(x.order) // max(len(x.grad), 1)
    how = {"wants_weights": True, **how}
    function, settings = ACTIVATIONS[name]
    d_hidden, active, d_weights = hidden_gradient(
        x.grad, x.order, k, x.weights, x.ends, x.down, x.bias, x.hidden,
        function.__name__, settings, **how,
    )  # fmt: skip
    for rows in (d_hidden, active):
        assert rows.dtype == x.hidden.dtype
        rows[int(x.ends[-1]) :] = 0
    return d_hidden, active, d_weights


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm())


def assert_as_good(found: Tensor | None, usual: Tensor | None, exact: Tensor | None) -> None:
    """No more than twice the error of plain PyTorch in the same format, and no less whole."""
    if exact is None or usual is None or found is None:
        assert found is exact
        return
    assert found.shape == exact.shape
    # Where a few sums are rounded once, either may be lucky; in 16 bits there are many.
    share = 1 / 2 if found.dtype == torch.float32 else 1 / 16
    least = share * torch.finfo(found.dtype).eps * float(exact.norm())
    assert error(found, exact) <= 2 * error(usual, exact) + least


def check(exact: Case, dtype: torch.dtype, name: str, **how: Any) -> None:
    found = launch(exact.to(dtype), name, **how)
    usual = plain(exact.to(dtype), name)
    for parts in zip(found, usual, plain(exact, name), strict=True):
        assert_as_good(*parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_hidden_gradients_of_activations(name: str, dtype: torch.dtype) -> None:
    check(case(dtype, gates=gated(name)), dtype, name)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_hidden_gradients_with_and_without_weights_and_biases(weighted: bool, biased: bool) -> None:
    exact = case(torch.float16, weighted=weighted, biased=biased)
    check(exact, torch.float16, "swiglu")


@pytest.mark.parametrize("sub", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hidden_gradients_by_descriptors_and_in_parts(sub: int, dtype: torch.dtype) -> None:
    with pinned(hidden_gradient=HIDDEN._replace(sub=sub, weights_tma=True)):
        check(case(dtype, d=32, n=48, biased=True), dtype, "clamped_swiglu")


def test_hidden_gradients_of_rows_that_are_grouped_already() -> None:
    exact = case(d=32, n=16, biased=True)
    x = exact.to(torch.float32)
    expected = launch(x, "swiglu")
    rows = x._replace(grad=x.grad[x.token])
    with pinned(hidden_gradient=HIDDEN._replace(rows_tma=True, weights_tma=True)):
        permuted = launch(x._replace(grad=rows.grad), "swiglu", permuted=True)
    assert all(map(torch.equal, permuted, expected))
    by_row = hidden_gradient(
        rows.grad, None, 1, x.weights.flatten()[x.order], x.ends, x.down, x.bias, x.hidden,
        "swiglu", {}, True,
    )  # fmt: skip
    stop = int(x.ends[-1])
    assert torch.equal(by_row[0][:stop], expected[0][:stop])
    assert torch.equal(by_row[2], expected[2].flatten()[x.order])


@pytest.mark.parametrize("counts", [(34,), (0, 34, 0), (0, 0), (1,) * 7])
def test_hidden_gradients_however_rows_fall(counts: tuple[int, ...]) -> None:
    check(case(counts=counts), torch.float32, "swiglu")


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16])
def test_hidden_gradients_of_few_tokens(tokens: int) -> None:
    exact = case(counts=(tokens, 0, tokens), tokens=tokens, n=5, gates=False)
    if tokens:
        return check(exact, torch.float32, "relu")
    x = exact._replace(order=exact.order.long()).to(torch.float32)
    shapes = [part.shape for part in launch(x, "relu")]
    assert shapes == [(0, 5), (0, 5), (0, 2)]


def test_weights_that_nobody_asks_for() -> None:
    x = case().to(torch.float32)
    *expected, _ = launch(x, "swiglu")
    *found, none = launch(x, "swiglu", wants_weights=False)
    assert none is None
    assert all(map(torch.equal, found, expected))


def test_gradients_of_weights_keep_their_format_and_refused_ones_get_none() -> None:
    x = case().to(torch.bfloat16)
    x = x._replace(weights=x.weights.float())
    _, _, d_weights = launch(x, "swiglu")
    assert d_weights.dtype == torch.float32
    refused = x.order[int(x.ends[-1]) :]
    assert len(refused) == 5
    assert torch.equal(d_weights.flatten()[refused], torch.zeros(5))
    assert (d_weights.flatten()[x.order[: int(x.ends[-1])]] != 0).all()


def test_nan_stays_in_its_rows() -> None:
    x = case(n=33, biased=True).to(torch.float32)
    expected = launch(x, "swiglu")
    stop = int(x.ends[-1])
    x.hidden[stop:] = float("nan")
    x.weights.view(-1)[x.order[stop:]] = float("nan")
    assert all(map(torch.equal, launch(x, "swiglu"), expected))
    token = int(x.token[0])
    x.grad[token] = float("nan")
    d_hidden, _, d_weights = launch(x, "swiglu")
    hit = x.token == token
    assert torch.isnan(d_hidden[hit]).any()
    assert torch.equal(d_hidden[~hit], expected[0][~hit])
    hit = torch.arange(len(x.grad)) == token
    assert torch.isnan(d_weights[hit]).any()
    assert torch.equal(d_weights[~hit], expected[2][~hit])


def test_memory_of_neighbours_does_not_leak_through_descriptors() -> None:
    x = case(d=32, n=40).to(torch.float32)
    expected = launch(x, "swiglu")
    with pinned(hidden_gradient=HIDDEN._replace(weights_tma=True)):
        assert all(map(torch.equal, launch(x, "swiglu"), expected))
        turned = x._replace(down=x.down.transpose(1, 2).contiguous().transpose(1, 2))
        assert not turned.down.is_contiguous()
        assert all(map(torch.equal, launch(turned, "swiglu"), expected))
        # Below the last rows of an expert's matrix lie those of the next.
        broken = turned.down.clone(memory_format=torch.preserve_format)
        broken[1] = float("nan")
        assert all(map(torch.equal, launch(x._replace(down=broken), "swiglu"), expected))


def test_hidden_gradients_of_strided_tensors() -> None:
    x = case(biased=True).to(torch.float32)
    expected = launch(x, "swiglu")
    strided = Case(*(spread(y) if y.is_floating_point() else y for y in x))
    assert all(map(torch.equal, launch(strided, "swiglu"), expected))
    ones = x._replace(grad=torch.ones_like(x.grad))
    expanded = x._replace(grad=torch.ones(1, 1).expand(x.grad.shape))
    assert all(map(torch.equal, launch(expanded, "swiglu"), launch(ones, "swiglu")))


def spread(x: Tensor) -> Tensor:
    """x, every other number of a larger tensor."""
    y = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))[..., ::2]
    return y.copy_(x)


def test_gradients_repeat_bit_by_bit() -> None:
    x = case(torch.bfloat16, biased=True).to(torch.bfloat16)
    first, second = launch(x, "swiglu"), launch(x, "swiglu")
    assert all(map(torch.equal, first, second))
    sums = [products(x, "left", bias=True) for _ in range(2)]
    assert all(map(torch.equal, *sums))


def products(x: Case, gathered: str, **how: Any) -> tuple[Tensor, Tensor | None]:
    """weight_gradient of grad and hidden, one of them by token or both by row."""
    k = len(x.order) // len(x.grad)
    if gathered == "none":
        return weight_gradient(x.hidden, x.grad[x.token], None, k, "none", x.ends, **how)
    sides = (x.grad, x.hidden) if gathered == "left" else (x.hidden, x.grad)
    return weight_gradient(*sides, x.order, k, gathered, x.ends, **how)


def plain_products(
    x: Case, gathered: str, row_weights: Tensor | None = None, bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    grad = x.grad[x.token]
    left, right = (grad, x.hidden) if gathered == "left" else (x.hidden, grad)
    out = torch.stack([left[span].T @ right[span] for span in spans(x.ends)])
    if not bias:
        return out, None
    if row_weights is not None:
        left = left * row_weights.flatten()[x.order][:, None].to(left.dtype)
    return out, torch.stack([left[span].sum(0) for span in spans(x.ends)])


def check_products(exact: Case, dtype: torch.dtype, gathered: str, **how: Any) -> None:
    x = exact.to(dtype)
    weighted = bool(how.pop("weighted", False))
    given = {**how, "row_weights": x.weights} if weighted else how
    wanted = {**how, "row_weights": exact.weights} if weighted else how
    found, usual = products(x, gathered, **given), plain_products(x, gathered, **given)
    for parts in zip(found, usual, plain_products(exact, gathered, **wanted), strict=True):
        assert_as_good(*parts)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gathered", ["left", "right", "none"])
def test_weight_gradients(gathered: str, dtype: torch.dtype, tma: bool) -> None:
    exact = case(dtype, d=40, n=24)
    with pinned(weight_gradient=WEIGHT._replace(rows_tma=tma)):
        check_products(exact, dtype, gathered, bias=True)


def test_weight_gradients_of_whole_and_of_broken_steps_without_branches() -> None:
    how = WEIGHT._replace(rows_tma=True, specialized=True)
    for counts in (COUNTS, (16, 0, 18), (2, 32)):  # the last of which ends where memory does
        exact = case(d=40, n=24, counts=counts)
        with pinned(weight_gradient=how):
            check_products(exact, torch.float32, "none")


@pytest.mark.parametrize("gathered", ["left", "right", "none"])
def test_weight_gradients_of_odd_widths(gathered: str) -> None:
    check_products(case(d=37, n=9), torch.float32, gathered)


@pytest.mark.parametrize("dtype", [torch.float32, *SHORT], ids=str)
def test_bias_gradients_weigh_rows(dtype: torch.dtype) -> None:
    check_products(case(dtype), dtype, "left", bias=True, weighted=True)


@pytest.mark.parametrize("counts", [(34,), (0, 34, 0), (0, 0), (1,) * 7])
def test_weight_gradients_however_rows_fall(counts: tuple[int, ...]) -> None:
    check_products(case(counts=counts), torch.float32, "right", bias=True)


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17])
def test_weight_gradients_of_few_tokens(tokens: int) -> None:
    exact = case(counts=(tokens, 0, tokens), tokens=tokens)
    if tokens:
        check_products(exact, torch.float32, "left", bias=True)
        return
    x = exact.to(torch.float32)
    out, bias = weight_gradient(x.grad, x.hidden, x.order, 2, "left", x.ends, bias=True)
    assert torch.equal(out, torch.zeros(3, 37, 42))
    assert torch.equal(bias, torch.zeros(3, 37))
    assert torch.equal(bias_gradient(x.hidden, x.ends), torch.zeros(3, 42))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("gathered", ["left", "right", "none"])
def test_nan_stays_in_its_expert(gathered: str, tma: bool) -> None:
    x = case(d=40, n=24).to(torch.float32)
    how = {"row_weights": x.weights if gathered == "left" else None, "bias": True}
    with pinned(weight_gradient=WEIGHT._replace(rows_tma=tma)):
        expected = products(x, gathered, **how)
        x.hidden[int(x.ends[-1]) :] = float("nan")  # of no expert
        assert all(map(torch.equal, products(x, gathered, **how), expected))
        x.hidden[int(x.ends[0])] = float("nan")  # of the third expert
        found = products(x, gathered, **how)
    clean = torch.tensor([0, 1, 3])
    assert torch.equal(found[0][clean], expected[0][clean])
    assert torch.equal(found[1][clean], expected[1][clean])
    assert torch.isnan(found[0][2]).any()


def test_weight_gradients_of_strided_tensors() -> None:
    x = case().to(torch.float32)
    strided = x._replace(hidden=spread(x.hidden), grad=spread(x.grad))
    for gathered in ("left", "right", "none"):
        assert torch.equal(products(strided, gathered)[0], products(x, gathered)[0])
    assert torch.equal(bias_gradient(strided.hidden, x.ends), bias_gradient(x.hidden, x.ends))


@pytest.mark.parametrize("dtype", [torch.float32, *SHORT], ids=str)
def test_sums_of_each_experts_rows(dtype: torch.dtype) -> None:
    exact = case(dtype, n=70)
    x = exact.to(dtype)
    x.hidden[int(x.ends[-1]) :] = float("nan")
    usual = plain_products(x, "right", bias=True)[1]
    wanted = plain_products(exact, "right", bias=True)[1]
    assert_as_good(bias_gradient(x.hidden, x.ends), usual, wanted)
