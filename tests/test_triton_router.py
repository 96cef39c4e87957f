"""Routers in one kernel: against float64, the eager op and torch's own checkers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_errors import pulled, ratios

from moegen.ops import router as eager
from moegen.ops.routing import top_k
from moegen_triton.kernels import router as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [
    ("softmax", "none", 0.0, 1.0),
    ("softmax", "sum", 0.0, 1.0),
    ("softmax", "softmax_over_kept", 0.0, 2.5),
    ("sigmoid", "sum", 1e-20, 2.5),
    ("sigmoid", "none", 0.0, 1.0),
    ("none", "softmax_over_kept", 0.0, 1.0),
    ("none", "none", 0.0, 0.5),
]
SIZES = [(0, 8, 4, 2), (1, 1, 1, 1), (3, 9, 3, 3), (2, 33, 130, 9)]
TOGETHER = kernels.Blocks(16, 16, 32, 4, 0)


@pytest.fixture(params=["spread", "together"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens are spread over the chip; take them together too, as many would be."""
    if request.param == "together":
        monkeypatch.setattr(kernels, "_blocks", lambda *_: TOGETHER)


def inputs(t: int, d: int, e: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Tokens, router, bias and balance bias."""
    torch.manual_seed(seed)
    router = torch.randn(e, d) * d**-0.5
    return torch.randn(t, d).to(dtype), router, torch.randn(e) * 0.1, torch.randn(e) * 0.05


def routed(route: Callable[..., Any], balance_bias: Tensor | None, **named: Any) -> Any:
    """Logits, scores and weights, as a function of tokens, router and bias."""

    def found(tokens: Tensor, router: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        logits, scores, experts, weights = route(tokens, router, bias, balance_bias, **named)
        chosen.append(experts)
        return logits, scores, weights

    chosen: list[Tensor] = []
    return found, chosen


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("affinity", "normalize", "eps", "scale"), FORMS)
def test_near_to_float64(
    affinity: str, normalize: str, eps: float, scale: float, dtype: torch.dtype
) -> None:
    t, d, e, k = 17, 70, 11, 3
    tokens, router, bias, balance = inputs(t, d, e, dtype)
    slopes = [torch.randn(t, e), torch.randn(t, e), torch.randn(t, k)]
    named = {"k": k, "affinity": affinity, "normalize": normalize, "eps": eps, "scale": scale}
    ours, chosen = routed(kernels.route, balance, **named)
    plain, wanted = routed(eager.route, balance, **named)
    assert max(ratios(ours, plain, tokens, router, bias, slopes=slopes)) <= 2
    assert torch.equal(chosen[0], wanted[0])


@pytest.mark.parametrize(("t", "d", "e", "k"), SIZES)
def test_sizes(t: int, d: int, e: int, k: int) -> None:
    tokens, router, bias, _ = inputs(t, d, e, torch.bfloat16)
    slopes = [torch.randn(t, e), torch.randn(t, e), torch.randn(t, k)]
    ours, chosen = routed(kernels.route, None, k=k)
    plain, wanted = routed(eager.route, None, k=k)
    assert max(ratios(ours, plain, tokens, router, bias, slopes=slopes)) <= 2
    assert torch.equal(chosen[0], wanted[0])


@pytest.mark.usefixtures("_both_ways")
def test_ties_go_to_the_lowest_expert() -> None:
    tokens, router, _, _ = inputs(4, 20, 10, torch.bfloat16)
    tokens[1] = 0  # all logits are one
    router[7] = router[2]
    router[5] = router[2]
    for affinity in ("softmax", "none"):
        _, scores, experts, _ = kernels.route(tokens, router, k=10, affinity=affinity)
        assert torch.equal(experts, top_k(scores, 10))
        assert experts[1].tolist() == list(range(10))


@pytest.mark.usefixtures("_both_ways")
def test_zeros_of_both_signs_tie() -> None:
    tokens, router = torch.ones(1, 1), torch.tensor([[-1.0], [0.0], [1.0], [-2.0]])
    balance = torch.tensor([1.0, -0.0, -1.0, 3.0])  # 0, -0 or 0, 0 and 1
    experts = kernels.route(tokens, router, None, balance, k=4, affinity="none")[2]
    assert experts.tolist() == [[3, 0, 1, 2]]


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("affinity", ["softmax", "sigmoid", "none"])
def test_nan_stays_with_its_token(affinity: str) -> None:
    tokens, router, bias, balance = inputs(5, 20, 6, torch.float32)
    named = {"k": 3, "affinity": affinity, "normalize": "sum"}
    whole = kernels.route(tokens, router, bias, balance, **named)
    tokens[2, 3] = float("nan")
    found = kernels.route(tokens, router, bias, balance, **named)
    others = torch.arange(5) != 2
    for got, want in zip(found, whole, strict=True):
        assert torch.equal(got[others], want[others])
        assert not got.is_floating_point() or torch.isnan(got[2]).all()
    assert torch.equal(found[2], top_k(found[1] + balance, 3))
    assert sorted(set(found[2][2].tolist())) == sorted(found[2][2].tolist())


def test_one_nan_among_logits_is_ordered_by_its_bits() -> None:
    tokens, router, bias, _ = inputs(3, 20, 6, torch.float32)
    for nan in (float("nan"), -float("nan")):
        bias[4] = nan
        _, scores, experts, _ = kernels.route(tokens, router, bias, k=3, affinity="none")
        assert torch.equal(experts, top_k(scores, 3))


def test_a_router_of_the_tokens_format() -> None:
    tokens, router, bias, _ = inputs(6, 40, 8, torch.bfloat16)
    wide = kernels.route(tokens, router.bfloat16().float(), bias, k=2)
    narrow = kernels.route(tokens, router.bfloat16(), bias, k=2)
    assert all(torch.equal(x, y) for x, y in zip(wide, narrow, strict=True))


def test_other_layouts() -> None:
    tokens, router, bias, balance = inputs(12, 40, 8, torch.float32)
    views = (
        tokens.t().contiguous().t(),
        torch.cat([router, router], 1)[:, :40],
        torch.stack([bias, bias], 1)[:, 0],
        torch.stack([balance, balance], 1)[:, 1],
    )
    got = kernels.route(*views, k=2)
    want = kernels.route(tokens, router, bias, balance, k=2)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    slope = torch.randn(2, 12).t()
    slopes = [torch.randn(8, 12).t(), torch.randn(12, 1).expand(12, 8), slope]
    ours, _ = routed(kernels.route, balance, k=2)
    plain, _ = routed(eager.route, balance, k=2)
    assert max(ratios(ours, plain, *views[:3], slopes=slopes)) <= 2


def test_many_tokens_are_summed_in_parts() -> None:
    tokens, router, bias, _ = inputs(600, 8, 4, torch.bfloat16)
    slopes = [torch.randn(600, 4), torch.randn(600, 4), torch.randn(600, 1)]
    ours, _ = routed(kernels.route, None, k=1, affinity="sigmoid")
    plain, _ = routed(eager.route, None, k=1, affinity="sigmoid")
    assert max(ratios(ours, plain, tokens, router, bias, slopes=slopes)) <= 2


def test_gradients_of_weights_alone() -> None:
    tokens, router, _, _ = inputs(6, 20, 5, torch.float32)

    def weights(route: Callable[..., Any], tokens: Tensor, router: Tensor) -> Tensor:
        found: Tensor = route(tokens, router, k=2, normalize="sum")[3]
        return found

    slopes = [torch.randn(6, 2)]
    ours, plain = partial(weights, kernels.route), partial(weights, eager.route)
    assert max(ratios(ours, plain, tokens, router, slopes=slopes)) <= 2


def test_what_is_not_wanted_is_empty() -> None:
    tokens, router, bias, _ = inputs(6, 20, 5, torch.float32)
    named: dict[str, Any] = {"k": 2, "wants_logits": False, "wants_scores": False}
    full = kernels.route(tokens, router, bias, k=2)
    logits, scores, *rest = kernels.route(tokens, router, bias, **named)
    assert logits.numel() == scores.numel() == 0
    assert all(torch.equal(x, y) for x, y in zip(rest, full[2:], strict=True))
    router.requires_grad_()
    found = kernels.route(tokens, router, bias, **named)
    found[3].sum().backward()
    got = router.grad
    router.grad = None
    kernels.route(tokens, router, bias, k=2)[3].sum().backward()
    assert got is not None
    assert torch.equal(got, router.grad)


def test_keeps_what_eager_keeps_or_less() -> None:
    tokens, router, bias, balance = inputs(6, 20, 5, torch.bfloat16)
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x
        return x

    for x in (tokens, router, bias):
        x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _, scores, experts, weights = kernels.route(tokens, router, bias, balance, k=2)
    allowed = {x.data_ptr() for x in (tokens, router, bias, scores, experts, weights)}
    assert set(kept) == allowed


def test_the_same_bits_every_time() -> None:
    tokens, router, bias, balance = inputs(300, 20, 5, torch.bfloat16)
    slopes = [torch.randn(300, 5), torch.randn(300, 5), torch.randn(300, 2)]
    ours, _ = routed(kernels.route, balance, k=2, normalize="sum")
    once, again = (pulled(ours, tokens, router, bias, slopes=slopes) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def test_refuses_float64() -> None:
    with pytest.raises(TypeError, match="float64"):
        kernels.route(torch.ones(2, 3).double(), torch.ones(4, 3), k=1)


def test_ops_are_sound_and_compile_whole() -> None:
    tokens, router, bias, balance = inputs(4, 20, 5, torch.float32)
    leaves = [x.requires_grad_() for x in (tokens, router, bias)]
    settings = (2, "softmax", "sum", 0.0, 1.0, True, True)
    torch.library.opcheck(kernels._op, (*leaves, balance, *settings))
    ours, _ = routed(kernels.route, balance, k=2, affinity="sigmoid")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    slopes = [torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 2)]
    got, want = (pulled(f, *leaves, slopes=slopes) for f in (compiled, ours))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
