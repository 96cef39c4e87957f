"""The ops on rows against a loop over experts in float64, and under torch's own checkers."""

import ast
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moegen.ops.experts as ops
from moegen.ops.op import OPS
from moegen.ops.routing import sort_by_expert

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EXPERTS, K = 5, 3
ROUTINGS: dict[str, Callable[[int], Tensor]] = {
    "some dropped": lambda t: torch.randint(0, EXPERTS + 1, (t, K)),
    "all to one": lambda t: torch.full((t, K), 3),
    "all dropped": lambda t: torch.full((t, K), EXPERTS),
}
Layer = Callable[..., Tensor]


def layer(
    x: Tensor, weight: Tensor, up: Tensor, bias: Tensor, down: Tensor, experts: Tensor
) -> Tensor:
    order, ends = sort_by_expert(experts, up.shape[0])
    hidden = ops.grouped_linear(ops.gather_rows(x, order), up, ends)
    hidden = F.silu(ops.grouped_bias(hidden, bias, ends))
    return ops.combine(ops.grouped_linear(hidden, down, ends), order, weight)


def loop(
    x: Tensor, weight: Tensor, up: Tensor, bias: Tensor, down: Tensor, experts: Tensor
) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(up.shape[0]):
        token, rank = torch.where(experts == e)
        rows = F.silu(F.linear(x[token], up[e]) + bias[e])
        rows = F.linear(rows, down[e]) * weight[token, rank].unsqueeze(-1)
        out = out.index_add(0, token, rows)
    return out


def arguments(t: int, d: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(t, d), (t, K), (EXPERTS, n, d), (EXPERTS, n), (EXPERTS, d, n)]
    scales = [1.0, 1.0, d**-0.5, 0.1, n**-0.5]
    return [
        (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def with_gradients(function: Layer, inputs: list[Tensor], *rest: Tensor) -> list[Tensor]:
    """Output and gradients; the gradient of a sum is an expanded tensor, which kernels dislike."""
    out = function(*inputs, *rest)
    return [out, *torch.autograd.grad(out.sum(), inputs)]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "d", "n"), [(64, 32, 16), (40, 15, 33), (1, 16, 8), (0, 16, 8)])
def test_layer_is_as_exact_as_a_loop(
    t: int, d: int, n: int, dtype: torch.dtype, routing: str
) -> None:
    torch.manual_seed(0)
    inputs, experts = arguments(t, d, n, dtype), ROUTINGS[routing](t)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = with_gradients(loop, exact_inputs, experts)
    plain = with_gradients(loop, inputs, experts)
    actual = with_gradients(layer, inputs, experts)
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert a.dtype == dtype
        assert a.shape == e.shape
        if e.numel():
            rounding = 4 * torch.finfo(dtype).eps * e.abs().max()
            assert (a - e).abs().max() <= 2 * (p - e).abs().max() + rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_leaks_out_of_rows_without_expert(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    rows = torch.randn(8, 16, dtype=dtype)
    rows[5:] = torch.nan
    rows.requires_grad_()
    weight = torch.randn(3, 24, 16, dtype=dtype, requires_grad=True)
    bias = torch.randn(3, 24, dtype=dtype, requires_grad=True)
    out = ops.grouped_bias(ops.grouped_linear(rows, weight, ends), bias, ends)
    grad = torch.randn_like(out)
    grad[5:] = torch.nan
    grad_rows, grad_weight, grad_bias = torch.autograd.grad(out, [rows, weight, bias], grad)
    assert not out[5:].any()
    assert not grad_rows[5:].any()
    assert grad_weight.isfinite().all()
    assert not grad_weight[1].any()
    assert not grad_bias[1].any()
    torch.testing.assert_close(grad_bias[2], grad[2:5].sum(0))


def test_inputs_may_have_any_strides() -> None:
    torch.manual_seed(0)
    ends = torch.tensor([3, 4, 9], dtype=torch.int32)
    rows, weight = torch.randn(10, 15), torch.randn(3, 8, 15)
    expected = ops.grouped_linear(rows, weight, ends)
    wide = torch.randn(10, 17)
    wide[:, 1:16] = rows
    for variant in (rows.t().contiguous().t(), wide[:, 1:16]):
        torch.testing.assert_close(ops.grouped_linear(variant, weight, ends), expected)
    for axes in ((0, 2, 1), (2, 1, 0), (1, 2, 0)):
        back = sorted(range(3), key=axes.__getitem__)
        strided = weight.permute(axes).contiguous().permute(back)
        torch.testing.assert_close(ops.grouped_linear(rows, strided, ends), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_rows_sums_what_each_token_owns(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    token = torch.tensor([4, 0, 4, 2, 4, 0])  # tokens 1, 3 and 5 own nothing
    rows = torch.randn(6, 10, dtype=dtype, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float32, requires_grad=True)
    out = ops.combine_rows(rows, token, weight, 6)
    expected = torch.zeros(6, 10, dtype=torch.float64)
    expected.index_add_(0, token, rows.double() * weight.to(dtype).double().unsqueeze(-1))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    grad_rows, grad_weight = torch.autograd.grad(out.sum(), [rows, weight])
    torch.testing.assert_close(grad_rows, weight.detach().to(dtype).unsqueeze(-1).expand(6, 10))
    torch.testing.assert_close(grad_weight, rows.detach().sum(-1).float(), rtol=0.02, atol=0.02)


def test_combine_rows_of_no_rows_is_zero() -> None:
    rows, token = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert torch.equal(ops.combine_rows(rows, token, torch.zeros(0), 3), torch.zeros(3, 4))


def test_zero_weight_choices_add_exactly_nothing() -> None:
    torch.manual_seed(0)
    rows, order = torch.randn(12, 8), torch.randperm(12)
    weight = torch.rand(4, 3)
    weight[:, 1] = 0
    expected = ops.combine(rows.masked_fill((order % 3 == 1).unsqueeze(-1), 0), order, weight)
    assert torch.equal(ops.combine(rows, order, weight), expected)


def test_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    inputs, experts = arguments(4, 3, 2, torch.float64), torch.randint(0, EXPERTS + 1, (4, K))
    assert torch.autograd.gradcheck(partial(layer, experts=experts), inputs)
    ends = torch.tensor([1, 1, 3, 4, 5], dtype=torch.int32)
    rows, weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), inputs[2]
    assert torch.autograd.gradgradcheck(partial(ops.grouped_linear, ends=ends), (rows, weight))
    token, factor = torch.tensor([2, 0, 2, 1, 2, 0]), torch.rand(6).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda rows, factor: ops.combine_rows(rows, token, factor, 4), (rows, factor)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_library_ops_pass_opcheck(dtype: torch.dtype) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    order, starts = torch.randperm(6), torch.tensor([0, 2, 4])
    library = torch.ops.moegen
    torch.library.opcheck(library.grouped_linear, (random(6, 15), random(3, 9, 15), ends))
    torch.library.opcheck(library.grouped_outer, (random(6, 15), random(6, 9), ends))
    torch.library.opcheck(library.gather_rows, (random(3, 8), order))
    inputs = (random(6, 8), random(6), order, starts, order // 2)
    torch.library.opcheck(library.sum_rows, inputs)


def test_results_are_the_same_bits_every_time() -> None:
    torch.manual_seed(0)
    inputs, experts = arguments(512, 64, 32, torch.float32), ROUTINGS["some dropped"](512)
    first, second = (with_gradients(layer, inputs, experts) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_breaks_for_any_number_of_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (12, 30):
        inputs, experts = arguments(t, 15, 16, dtype), ROUTINGS["some dropped"](t)
        actual = with_gradients(compiled, inputs, experts)
        expected = with_gradients(layer, inputs, experts)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# Inductor's own imports use deprecated parts of torch.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_with_inductor() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    inputs, experts = arguments(12, 16, 8, torch.float32), ROUTINGS["some dropped"](12)
    actual = with_gradients(torch.compile(layer, fullgraph=True), inputs, experts)
    torch.testing.assert_close(actual, with_gradients(layer, inputs, experts))


class ExpertChoice(torch.nn.Module):
    def forward(self, rows: Tensor, token: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        return ops.combine_rows(rows, token, weight, tokens.shape[0])


class Wrapped(torch.nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return layer(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exports_with_a_free_number_of_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens = torch.export.Dim("tokens", min=2)
    free = ({0: tokens}, {0: tokens}, None, None, None, {0: tokens})
    inputs = (*arguments(12, 15, 16, dtype), ROUTINGS["some dropped"](12))
    program = torch.export.export(Wrapped(), inputs, dynamic_shapes=(free,)).module()
    for t in (12, 30):
        inputs = (*arguments(t, 15, 16, dtype), ROUTINGS["some dropped"](t))
        assert torch.equal(program(*inputs), layer(*inputs))


def test_combine_rows_compiles_and_exports() -> None:
    inputs = (torch.randn(6, 4), torch.tensor([4, 0, 4, 2, 4, 0]), torch.rand(6), torch.zeros(5, 4))
    expected = ExpertChoice()(*inputs)
    compiled = torch.compile(ExpertChoice(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), expected)
    assert torch.equal(torch.export.export(ExpertChoice(), inputs).module()(*inputs), expected)


def saved_bytes(function: Layer, *inputs: Tensor | int) -> int:
    """Bytes of the distinct storages that backward keeps."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*inputs)
    assert out.requires_grad
    return sum(kept.values())


def test_declared_memory_is_what_backward_keeps() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    rows, weight = torch.randn(6, 16, requires_grad=True), torch.randn(3, 8, 16, requires_grad=True)
    bias = torch.randn(3, 16, requires_grad=True)
    order, factor = torch.randperm(6), torch.rand(3, 2, requires_grad=True)
    calls: dict[str, tuple[Any, ...]] = {
        "gather_rows": (torch.randn(3, 16, requires_grad=True), order),
        "grouped_linear": (rows, weight, ends),
        "grouped_bias": (rows, bias, ends),
        "combine": (rows, order, factor),
        "combine_rows": (rows, order // 2, factor.flatten().detach().requires_grad_(), 3),
    }
    for name, call in calls.items():
        op = OPS[name]
        named = dict(zip(op.reference.__annotations__, call, strict=False))
        names = op.saves(*call) if callable(op.saves) else op.saves
        declared = sum(named[key].nbytes for key in names)
        declared += op.extra(*call) if op.extra else 0
        assert saved_bytes(op.reference, *call) == declared, name


def copy_of_ops(name: str) -> ModuleType:
    """The ops as another package would carry them: same source, decorators of moegen dropped."""
    tree = ast.parse(Path(ops.__file__).read_text())
    tree.body = [n for n in tree.body if getattr(n, "module", None) != "moegen.ops.op"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(ast.unparse(tree), name, "exec"), module.__dict__)
    return module


def test_copies_of_the_source_live_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    inputs, experts = arguments(12, 16, 8, torch.float32), ROUTINGS["some dropped"](12)
    expected = with_gradients(layer, inputs, experts)

    def through(copy: ModuleType) -> Layer:
        def run(x: Tensor, weight: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
            order, ends = sort_by_expert(experts, EXPERTS)
            hidden = copy.grouped_linear(copy.gather_rows(x, order), up, ends)
            hidden = F.silu(copy.grouped_bias(hidden, bias, ends))
            out: Tensor = copy.combine(copy.grouped_linear(hidden, down, ends), order, weight)
            return out

        return run

    first = through(copy_of_ops("first_package_ops"))
    compiled = torch.compile(first, fullgraph=True, backend="aot_eager")
    with_gradients(compiled, inputs)
    second = through(copy_of_ops("second_package_ops"))
    for run in (first, compiled, second, torch.compile(second, backend="aot_eager")):
        actual = with_gradients(run, inputs)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    for name in ("first_package_ops", "second_package_ops"):
        monkeypatch.delitem(sys.modules, name)
