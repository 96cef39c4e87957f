"""Routed experts on Triton: meaning, gradients, memory, and their place among torch's tools."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from triton_cases import ACTIVATIONS, Layer, check, fused, layer, plain, results, slope

from moegen_triton.kernels import feed_forward
from moegen_triton.kernels.activations import kernel_name
from moegen_triton.kernels.feed_forward import grouped_feed_forward, routed_feed_forward
from moegen_triton.kernels.tiles import Tile, pinned

#: Choices of seven tokens among four experts; 4 is nowhere, and nobody chooses 2.
EXPERTS = [[0, 1], [1, 4], [3, 1], [4, 4], [1, 3], [0, 3], [1, 0]]
ALL = {"up", "down", "hidden_gradient", "input_gradient", "weight_gradient"}
WIDE = Tile(16, 32, 32, warps=1, stages=1)

# NumPy warns of what kernels compute with NaN, and of exponents that overflow to infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def wide(**changes: Any) -> Any:
    """Tiles that hold all columns, so that little runs."""
    return pinned(**{kernel: WIDE._replace(**changes) for kernel in ALL})


def same(x: dict[str, Tensor], y: dict[str, Tensor]) -> bool:
    return all(torch.equal(x[name], y[name]) for name in x | y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_gradients_in_every_format(dtype: torch.dtype) -> None:
    check(layer(EXPERTS, d=40, n=24, dtype=dtype, biases=True))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_every_activation(kind: str) -> None:
    with wide():
        check(layer([[0, 1], [2, 1], [1, 0]] * 4, 2, 16, 24, kind=kind))


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel for the activation 'softplus'"):
        kernel_name("softplus")


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17])
def test_any_number_of_tokens(tokens: int) -> None:
    with wide():
        x = layer(torch.arange(tokens).unsqueeze(-1) % 2, 2)
        found = check(x)
        assert found["out"] <= 2
        assert fused(x).shape == (tokens, 20)


@pytest.mark.parametrize("variant", [{}, {"recompute": True}, {"permute": True}], ids=str)
def test_all_tokens_to_one_expert_with_odd_widths(variant: dict[str, bool]) -> None:
    check(layer([[2]] * 19, d=19, n=13, biases=True), **variant)


def test_variants_are_bitwise_equal() -> None:
    x = layer(EXPERTS, biases=True)
    with wide():
        once = results(x, fused)
        assert same(once, results(x, fused))
        assert same(once, results(x, fused, recompute=True))
        assert same(once, results(x, fused, permute=True))
        with torch.no_grad():
            assert torch.equal(once["out"], fused(x))


@pytest.mark.parametrize("sub", [1, 4])
def test_descriptors_give_the_same_bits(sub: int) -> None:
    x = layer(EXPERTS, d=48, n=32, dtype=torch.bfloat16)
    with wide(sub=sub):
        pointers = results(x, fused, permute=True)
    with wide(sub=sub, weights_tma=True, rows_tma=True, specialized=sub == 1):
        assert same(pointers, results(x, fused, permute=True))


def test_unaligned_matrices_are_read_by_pointers() -> None:
    with wide(weights_tma=True, rows_tma=True):
        check(layer(EXPERTS, d=21, n=11, dtype=torch.bfloat16))


@pytest.mark.parametrize("tma", [False, True])
def test_strided_inputs(tma: bool) -> None:
    def strided(x: Tensor) -> Tensor:
        """The same numbers with gaps, matrices stored the other way round."""
        if x.dim() == 3:
            return x.detach().mT.contiguous().mT.requires_grad_()
        return x.detach().repeat_interleave(2, -1)[:, ::2].requires_grad_()

    x = layer(EXPERTS, d=32, n=16, biases=True)
    y = x._replace(inputs=x.inputs.map(strided))
    assert not any(z.is_contiguous() for z in y.inputs.present())
    assert all(map(torch.equal, x.inputs.present(), y.inputs.present()))
    with wide(weights_tma=tma, rows_tma=tma):
        check(y)


def test_a_gradient_without_memory_of_its_own() -> None:
    x = layer(EXPERTS)
    with wide():
        (expanded,) = torch.autograd.grad(fused(x).sum(), x.inputs.tokens)
        ones = torch.ones(len(EXPERTS), 20)
        (whole,) = torch.autograd.grad(fused(x), x.inputs.tokens, ones)
    assert torch.equal(expanded, whole)


def grouped(x: Layer) -> Tensor:
    """The layer's experts on rows gathered by PyTorch, and summed by it."""
    tokens, weights, *parameters = x.inputs
    rows = tokens[x.order // weights.shape[1]]
    rows = rows.index_fill(0, torch.arange(int(x.ends[-1]), len(rows)), torch.nan)
    out = grouped_feed_forward(rows, x.ends, *parameters, activation=x.activation, **x.settings)
    choices = out[x.order.argsort()].view(*weights.shape, -1)
    return (choices * weights.unsqueeze(-1)).sum(1)


def test_rows_that_were_dispatched_before() -> None:
    """Rows of no expert hold NaN here, and neither outputs nor gradients know of it."""
    check(layer(EXPERTS, biases=True), grouped)


def test_tails_of_dispatched_rows_are_zero() -> None:
    rows = torch.full((9, 16), torch.nan, requires_grad=True)
    up, down = torch.randn(2, 2, 16, 16).requires_grad_()
    ends = torch.zeros(2, dtype=torch.int32)
    out = grouped_feed_forward(rows, ends, up, down, activation=ACTIVATIONS["relu"][0])
    grads = torch.autograd.grad(out.sum(), (rows, up, down))
    assert not any(x.any() for x in (out, *grads))


def test_weights_of_choices_of_no_expert_do_not_count() -> None:
    x = layer(EXPERTS, biases=True)
    weights = x.inputs.weights.detach().clone()
    weights[torch.tensor(EXPERTS) == 4] = torch.nan
    y = x._replace(inputs=x.inputs._replace(weights=weights.requires_grad_()))
    with wide():
        assert same(results(x, fused), results(y, fused))


def test_nan_stays_with_its_token() -> None:
    x = layer(EXPERTS, biases=True)
    tokens = x.inputs.tokens.detach().clone()
    tokens[0] = torch.nan
    y = x._replace(inputs=x.inputs._replace(tokens=tokens.requires_grad_()))
    with wide():
        clean, soiled = results(x, fused), results(y, fused)
    for name in ("out", "tokens", "weights"):
        assert soiled[name][0].isnan().all()
        assert torch.equal(clean[name][1:], soiled[name][1:])
    for name in ("up", "down"):  # the token went to experts 0 and 1
        assert torch.equal(clean[name][2:], soiled[name][2:])


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_keep_nan(kind: str) -> None:
    x = layer([[0]], 1, 16, 16, kind=kind)
    tokens = torch.full_like(x.inputs.tokens, torch.nan)
    with wide(), torch.no_grad():
        y = x._replace(inputs=x.inputs._replace(tokens=tokens))
        assert fused(y).isnan().all()


def kept(x: Layer, **kwargs: Any) -> int:
    """Bytes of what is kept for the backward pass beside parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in x.inputs[2:] if p is not None}
    storages: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return saved

    with wide(), saved_tensors_hooks(pack, lambda saved: saved):
        out = fused(x, **kwargs)
        assert out.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("variant", [{}, {"permute": True}], ids=str)
def test_tokens_and_hidden_values_are_kept(variant: dict[str, bool]) -> None:
    """2d + 4Kn bytes a token, and what says where tokens went."""
    x = layer(EXPERTS, d=32, n=16, dtype=torch.bfloat16, biases=True)
    weights = x.inputs.weights.detach().float().requires_grad_()
    x = x._replace(inputs=x.inputs._replace(weights=weights))
    routing = x.order.nbytes + weights.nbytes + x.ends.nbytes
    tokens, k = weights.shape
    assert kept(x, **variant) == tokens * (2 * 32 + 4 * k * 16) + routing
    assert kept(x, recompute=True, **variant) == tokens * 2 * 32 + routing


def test_nothing_is_stored_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = []
    project = feed_forward.project

    def spy(*args: Any) -> Any:
        stored.append(args[8])
        return project(*args)

    monkeypatch.setattr(feed_forward, "project", spy)
    x = layer([[0]], 1)
    with wide():
        with torch.no_grad():
            fused(x)
        fused(x._replace(inputs=x.inputs.map(torch.Tensor.detach)))
        fused(x)
    assert stored == [False, False, True]


@pytest.mark.parametrize("learnt", ["tokens", "weights", "up", "down", "up_bias", "down_bias"])
def test_one_of_all_learns(learnt: str) -> None:
    x = layer([[0, 1], [1, 0]], 2, 16, 16, biases=True)
    only = x._replace(inputs=x.inputs.map(torch.Tensor.detach))
    alone = getattr(x.inputs, learnt)
    only = only._replace(inputs=only.inputs._replace(**{learnt: alone}))
    with wide():
        out = fused(only)
        (found,) = torch.autograd.grad(out, alone, slope(out))
        assert torch.equal(found, results(x, fused)[learnt])


def test_opcheck() -> None:
    x = layer([[0], [1]], 2, 8, 8, biases=True)
    tokens, weights, *parameters = x.inputs
    rest = (*parameters, "swiglu", 7.0, 1.702, True, False)
    with wide():
        torch.library.opcheck(feed_forward._feed_forward, (tokens, x.order, weights, x.ends, *rest))
        torch.library.opcheck(feed_forward._feed_forward, (tokens, None, None, x.ends, *rest))


def test_compiled_whole() -> None:
    x = layer(EXPERTS, biases=True)

    def run(*inputs: Tensor) -> Tensor:
        tokens, weights, *parameters = inputs
        return 2 * routed_feed_forward(
            tokens * 1, x.order, weights, x.ends, *parameters, activation=x.activation
        )

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with wide():
        out = compiled(*x.inputs)
        found = torch.autograd.grad(out, x.inputs.present(), slope(out))
        exact = run(*x.inputs)
        expected = torch.autograd.grad(exact, x.inputs.present(), slope(exact))
        assert torch.equal(out, exact)
        assert all(map(torch.equal, found, expected))
        with torch.no_grad():
            assert torch.equal(compiled(*x.inputs), exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    x = layer(EXPERTS)

    def run(y: Layer) -> Tensor:
        tokens = y.inputs.tokens

        def inner(tokens: Tensor) -> Tensor:
            return fused(y._replace(inputs=y.inputs._replace(tokens=tokens)))

        return checkpoint(inner, tokens, use_reentrant=reentrant)

    with wide():
        out = run(x)
        out.backward(slope(out))
        grads = [y.grad for y in x.inputs.present()]
        x = layer(EXPERTS)
        expected = list(results(x, fused).values())
    assert all(map(torch.equal, [out.detach(), *grads], expected))


def test_autocast() -> None:
    x = layer(EXPERTS, biases=True)

    def run(y: Layer) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fused(y)

    with wide():
        out = run(x)
        grads = torch.autograd.grad(out, x.inputs.present(), slope(out))
        weights = x.inputs.weights.detach().requires_grad_()  # these are not cast
        y = x.to(torch.bfloat16)
        y = y._replace(inputs=y.inputs._replace(weights=weights))
        expected = results(y, fused)
    assert out.dtype == torch.bfloat16
    assert all(y.dtype == torch.float32 for y in grads)
    found = [out, *grads]
    assert all(torch.equal(p, q.to(p.dtype)) for p, q in zip(found, expected.values(), strict=True))


def test_tokens_take_the_format_of_parameters() -> None:
    x = layer([[0], [1]], 2, dtype=torch.bfloat16)
    tokens = x.inputs.tokens.detach().float().requires_grad_()
    y = x._replace(inputs=x.inputs._replace(tokens=tokens))
    with wide():
        out = fused(y)
        assert out.dtype == torch.bfloat16
        (grad,) = torch.autograd.grad(out.sum(), tokens)
    assert grad.dtype == torch.float32


def test_wrong_formats_and_shapes_are_refused() -> None:
    x = layer([[0]], 1)
    with pytest.raises(TypeError, match=r"float16, not torch\.float64"):
        fused(x.to(torch.float64))
    with pytest.raises(ValueError, match=r"relu does not lead from up \(1, 24, 20\)"):
        fused(x._replace(activation=ACTIVATIONS["relu"][0]))


def test_offsets_beyond_two_to_the_31() -> None:
    """Tokens and matrices that lie far apart, in memory that is never touched between."""
    x = layer([[0, 1], [1, 0], [1, 1]], 2, 16, 16, kind="relu", dtype=torch.float16)
    apart = 2**30 + 8

    def spread(y: Tensor) -> Tensor:
        space = torch.empty((len(y) - 1) * apart + y[0].numel(), dtype=y.dtype)
        far = space.as_strided(y.shape, (apart, *y.stride()[1:]))
        return far.copy_(y.detach())

    tokens, up = spread(x.inputs.tokens), spread(x.inputs.up)
    y = x._replace(inputs=x.inputs._replace(tokens=tokens, up=up))
    with wide(), torch.no_grad():
        assert torch.equal(fused(x), fused(y))


def test_a_second_import_finds_the_ops() -> None:
    before = feed_forward._feed_forward
    again = importlib.reload(feed_forward)
    assert again._feed_forward is before
    assert plain(layer([[0]], 1)).shape == (1, 20)
