"""A layer's experts as one op against a loop over experts, in its memory, FLOPs and traces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from counted_flops import counter
from kept_memory import distinct_bytes, kept
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from moegen.emit.sources import ops_module
from moegen.ops import activations as act
from moegen.ops.feed_forward import grouped_feed_forward, routed_feed_forward
from moegen.ops.op import OPS
from moegen.ops.routing import sort_by_expert

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EXPERTS, K = 5, 3
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "swiglu": (act.swiglu, {}),
    "geglu": (act.geglu, {}),
    "geglu by tanh": (act.geglu, {"approximate": "tanh"}),
    "reglu": (act.reglu, {}),
    "clamped": (act.clamped_swiglu, {"limit": 1.0, "alpha": 1.702}),
    "relu": (F.relu, {}),
    "relu2": (act.relu2, {}),
    "gelu": (F.gelu, {"approximate": "tanh"}),
    "silu": (F.silu, {}),
    "cubic": (act.cubic, {}),
    "identity": (act.identity, {}),
    "of one's own": (lambda x: torch.sin(x) * x, {}),
}
PLAIN = {"relu", "relu2", "gelu", "silu", "cubic", "identity", "of one's own"}
ROUTINGS: dict[str, Callable[[int], Tensor]] = {
    "some refused": lambda t: torch.randint(0, EXPERTS + 1, (t, K)),
    "an expert idle": lambda t: torch.randint(0, EXPERTS - 1, (t, K)),
    "all to one": lambda t: torch.full((t, K), 3),
    "all refused": lambda t: torch.full((t, K), EXPERTS),
}
Run = Callable[..., Tensor]


def arguments(
    t: int, d: int, n: int, *, gated: bool = True, bias: bool = True, dtype: Any = torch.float32
) -> dict[str, Tensor]:
    torch.manual_seed(t + d + n)
    wide = 2 * n if gated else n
    shapes = {
        "tokens": ((t, d), 1.0),
        "weights": ((t, K), 1.0),
        "up": ((EXPERTS, wide, d), d**-0.5),
        "down": ((EXPERTS, d, n), n**-0.5),
    }
    if bias:
        shapes |= {"up_bias": ((EXPERTS, wide), 0.3), "down_bias": ((EXPERTS, d), 0.3)}
    return {
        name: (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()
        for name, (shape, scale) in shapes.items()
    }


def routed(inputs: dict[str, Tensor], experts: Tensor, **options: Any) -> Tensor:
    order, ends = sort_by_expert(experts, EXPERTS)
    return routed_feed_forward(**inputs, order=order, ends=ends, **options)


def network(
    x: Tensor, e: int, inputs: dict[str, Tensor], activation: Run, settings: dict[str, Any]
) -> Tensor:
    """One expert's network in plain torch."""
    hidden = F.linear(x, inputs["up"][e], inputs["up_bias"][e] if "up_bias" in inputs else None)
    gated = hidden.shape[-1] != inputs["down"].shape[2]
    hidden = activation(*(hidden.chunk(2, -1) if gated else (hidden,)), **settings)
    shift = inputs["down_bias"][e] if "down_bias" in inputs else None
    return F.linear(hidden, inputs["down"][e], shift)


def loop(inputs: dict[str, Tensor], experts: Tensor, *, activation: Run, **settings: Any) -> Tensor:
    settings.pop("recompute", None)
    out = torch.zeros_like(inputs["tokens"])
    for e in range(EXPERTS):
        token, rank = torch.where(experts == e)
        y = network(inputs["tokens"][token], e, inputs, activation, settings)
        out = out.index_add(0, token, y * inputs["weights"][token, rank].unsqueeze(-1))
    return out


def grouped_loop(
    rows: Tensor, ends: Tensor, activation: Run, settings: dict[str, Any], **inputs: Tensor
) -> Tensor:
    stops = [0, *ends.tolist()]
    parts = [
        network(rows[a:b], e, inputs, activation, settings)
        for e, (a, b) in enumerate(pairwise(stops))
    ]
    return torch.cat([*parts, torch.zeros_like(rows[stops[-1] :])])


def with_gradients(run: Callable[[], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and gradients of all inputs, from a gradient drawn by chance."""
    out = run()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = torch.autograd.grad(out, list(inputs.values()), grad.to(out.dtype), allow_unused=True)
    gradients = zip(inputs, found, strict=True)
    return {
        "out": out.detach(),
        **{k: torch.zeros_like(inputs[k]) if g is None else g for k, g in gradients},
    }


def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x.detach().double().requires_grad_() for k, x in inputs.items()}


def assert_as_exact(
    actual: dict[str, Tensor], plain: dict[str, Tensor], true: dict[str, Tensor]
) -> None:
    for name, e in true.items():
        a, p = actual[name], plain[name]
        assert a.dtype == p.dtype, name
        assert a.shape == e.shape, name
        if e.numel():
            times = 64 if a.dtype == torch.float64 else 4  # there the loop is its own measure
            rounding = times * torch.finfo(a.dtype).eps * e.abs().max()
            assert (a - e).abs().max() <= 2 * (p - e).abs().max() + rounding, name


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


# Values


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_as_exact_as_a_loop(name: str, dtype: torch.dtype, bias: bool) -> None:
    activation, settings = ACTIVATIONS[name]
    inputs = arguments(40, 32, 16, gated=name not in PLAIN, bias=bias, dtype=dtype)
    experts, options = ROUTINGS["some refused"](40), {"activation": activation, **settings}
    double = exact(inputs)
    true = with_gradients(lambda: loop(double, experts, **options), double)
    plain = with_gradients(lambda: loop(inputs, experts, **options), inputs)
    actual = with_gradients(lambda: routed(inputs, experts, **options), inputs)
    assert_as_exact(actual, plain, true)
    again = with_gradients(lambda: routed(inputs, experts, recompute=True, **options), inputs)
    assert_same(actual, again)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "d", "n"), [(300, 24, 8), (40, 15, 33), (1, 16, 8), (0, 16, 8)])
def test_any_number_of_rows_and_width(
    t: int, d: int, n: int, dtype: torch.dtype, routing: str
) -> None:
    inputs, options = arguments(t, d, n, dtype=dtype), {"activation": act.swiglu}
    experts, double = ROUTINGS[routing](t), exact(inputs)
    true = with_gradients(lambda: loop(double, experts, **options), double)
    plain = with_gradients(lambda: loop(inputs, experts, **options), inputs)
    actual = with_gradients(lambda: routed(inputs, experts, **options), inputs)
    assert_as_exact(actual, plain, true)


@pytest.mark.parametrize("ends", [[2, 2, 5, 9, 9], [0, 0, 0, 0, 0], [0, 12, 12, 12, 12]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["clamped", "gelu"])
def test_rows_that_are_grouped_already(name: str, dtype: torch.dtype, ends: list[int]) -> None:
    activation, settings = ACTIVATIONS[name]
    inputs = arguments(12, 15, 8, gated=name not in PLAIN, dtype=dtype)
    del inputs["weights"]
    inputs["rows"] = inputs.pop("tokens")
    stops, double = torch.tensor(ends, dtype=torch.int32), exact(inputs)
    reference = partial(grouped_loop, ends=stops, activation=activation, settings=settings)
    true = with_gradients(lambda: reference(**double), double)
    plain = with_gradients(lambda: reference(**inputs), inputs)
    for recompute in (False, True):
        actual = with_gradients(
            lambda again=recompute: grouped_feed_forward(
                **inputs, ends=stops, activation=activation, recompute=again, **settings
            ),
            inputs,
        )
        assert_as_exact(actual, plain, true)


def test_weights_may_be_wider_than_tokens() -> None:
    inputs = arguments(40, 16, 8, dtype=torch.bfloat16)
    inputs["weights"] = inputs["weights"].detach().float().requires_grad_()
    experts, options = ROUTINGS["some refused"](40), {"activation": act.swiglu}
    double = exact(inputs)
    actual = with_gradients(lambda: routed(inputs, experts, **options), inputs)
    true = with_gradients(lambda: loop(double, experts, **options), double)
    assert actual["weights"].dtype == torch.float32
    for name, e in true.items():
        assert (actual[name] - e).abs().max() <= 0.03 * e.abs().max(), name


def test_gradients_match_finite_differences() -> None:
    inputs = arguments(4, 3, 2, dtype=torch.float64)
    experts = torch.tensor([[0, 4, 5], [0, 1, 4], [5, 5, 5], [1, 0, 4]])

    def run(*values: Tensor, **options: Any) -> Tensor:
        return routed(dict(zip(inputs, values, strict=True)), experts, **options)

    for recompute in (False, True):
        layer = partial(run, activation=act.swiglu, recompute=recompute)
        assert torch.autograd.gradcheck(layer, tuple(inputs.values()))


def test_a_step_has_no_slope() -> None:
    inputs, experts = arguments(20, 16, 8, gated=False), ROUTINGS["some refused"](20)
    found = with_gradients(
        lambda: routed(inputs, experts, activation=lambda x: (x > 0).to(x.dtype)), inputs
    )
    assert found["down"].any()
    assert not any(found[key].any() for key in ("tokens", "up", "up_bias"))


# What must not leak, and what must not differ


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_no_expert_are_ignored_whatever_they_hold(dtype: torch.dtype) -> None:
    inputs = arguments(8, 16, 8, dtype=dtype)
    del inputs["weights"]
    rows = inputs.pop("tokens").detach()
    rows[5:] = torch.nan
    inputs["rows"] = rows.requires_grad_()
    ends = torch.tensor([2, 2, 5, 5, 5], dtype=torch.int32)
    out = grouped_feed_forward(**inputs, ends=ends, activation=act.swiglu)
    grad = torch.randn_like(out)
    grad[5:] = torch.nan
    found = dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), grad), strict=True))
    assert not out[5:].any()
    assert not found["rows"][5:].any()
    for name in ("up", "down", "up_bias", "down_bias"):
        assert found[name].isfinite().all()
        assert not found[name][[1, 3, 4]].any()


def test_a_bad_token_spoils_itself_and_its_experts_alone() -> None:
    inputs = arguments(20, 16, 8)
    tokens = inputs["tokens"].detach()
    tokens[3] = torch.nan
    inputs["tokens"] = tokens.requires_grad_()
    experts = torch.randint(0, 3, (20, K))
    experts[3] = torch.tensor([4, 4, 5])
    found = with_gradients(lambda: routed(inputs, experts, activation=act.swiglu), inputs)
    rest = torch.arange(20) != 3
    for name in ("out", "tokens", "weights"):
        assert found[name][rest].isfinite().all(), name
    assert found["out"][3].isnan().all()
    for name in ("up", "down", "up_bias"):
        assert found[name][:4].isfinite().all(), name


def test_results_are_the_same_bits_every_time() -> None:
    inputs, experts = arguments(512, 64, 32), ROUTINGS["some refused"](512)
    run = partial(routed, inputs, experts, activation=act.swiglu)
    assert_same(with_gradients(run, inputs), with_gradients(run, inputs))


def test_inputs_may_have_any_strides() -> None:
    inputs, experts = arguments(40, 16, 8), ROUTINGS["some refused"](40)
    run = partial(routed, experts=experts, activation=act.swiglu)
    expected = with_gradients(lambda: run(inputs), inputs)
    turned = {
        k: x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
        for k, x in inputs.items()
    }
    wide = {k: F.pad(x.detach(), (1, 2))[..., 1:-2].requires_grad_() for k, x in inputs.items()}
    for variant in (turned, wide):
        actual = with_gradients(lambda given=variant: run(given), variant)
        torch.testing.assert_close(actual, expected)


def test_a_gradient_may_be_one_number_expanded() -> None:
    inputs, experts = arguments(40, 16, 8), ROUTINGS["some refused"](40)
    ends = torch.tensor([3, 9, 9, 20, 31], dtype=torch.int32)
    parameters = {k: x for k, x in inputs.items() if k not in ("tokens", "weights")}
    for out in (
        routed(inputs, experts, activation=act.swiglu),
        grouped_feed_forward(inputs["tokens"], ends, **parameters, activation=act.swiglu),
    ):
        values = list(parameters.values())
        expected = torch.autograd.grad(out, values, torch.ones_like(out), retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), values), expected)


@pytest.mark.parametrize("frozen", ["tokens", "weights", "up", "down", "up_bias", "down_bias"])
def test_frozen_inputs_change_no_other_gradient(frozen: str) -> None:
    inputs, experts = arguments(40, 16, 8), ROUTINGS["some refused"](40)
    run = partial(routed, inputs, experts, activation=act.swiglu)
    everything = with_gradients(run, inputs)
    inputs[frozen].requires_grad_(False)
    free = {k: x for k, x in inputs.items() if k != frozen}
    found = with_gradients(run, free)
    assert_same(found, {k: x for k, x in everything.items() if k != frozen})


def test_gradients_of_gradients_are_refused() -> None:
    inputs, experts = arguments(4, 16, 8), ROUTINGS["all to one"](4)
    out = routed(inputs, experts, activation=act.swiglu)
    with pytest.raises(RuntimeError, match="no gradient of their gradient"):
        torch.autograd.grad(out.sum(), inputs["tokens"], create_graph=True)


# Memory and FLOPs


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["swiglu", "relu"])
@pytest.mark.parametrize("order_given", [True, False], ids=["routed", "grouped"])
def test_declared_memory_is_what_backward_keeps(
    order_given: bool, name: str, dtype: torch.dtype, recompute: bool
) -> None:
    t, d, n = 24, 16, 8
    inputs = arguments(t, d, n, gated=name not in PLAIN, dtype=dtype)
    parameters = [inputs[k] for k in ("up", "down", "up_bias", "down_bias")]
    order, ends = sort_by_expert(ROUTINGS["some refused"](t), EXPERTS)
    if order_given:
        op = OPS["routed_feed_forward"]
        given = {k: inputs[k] for k in ("tokens", "weights")} | {"order": order, "ends": ends}
        call = (given["tokens"], order, given["weights"], ends, *parameters)
    else:
        op, given = OPS["grouped_feed_forward"], {"rows": inputs["tokens"], "ends": ends}
        call = (given["rows"], ends, *parameters)
    options = {"activation": ACTIVATIONS[name][0], "recompute": recompute}
    found = kept(lambda: op.reference(*call, **options), cuda=False)
    assert callable(op.saves)
    assert op.extra is not None
    declared = sum(given[key].nbytes for key in op.saves(*call, **options) if key in given)
    declared += op.extra(*call, **options)
    assert distinct_bytes(found, parameters) == declared
    rows, size = (t * K if order_given else t), dtype.itemsize
    wide = 2 * n if name not in PLAIN else n
    shares = (8 + size) * t * K if order_given else 0
    by_hand = size * (t * d + (0 if recompute else rows * wide)) + shares + 4 * EXPERTS
    assert declared == by_hand


def test_tokens_that_are_cast_are_kept_as_cast() -> None:
    inputs, op = arguments(24, 16, 8, dtype=torch.bfloat16), OPS["routed_feed_forward"]
    tokens = inputs["tokens"].detach().float().requires_grad_()
    order, ends = sort_by_expert(ROUTINGS["some refused"](24), EXPERTS)
    parameters = [inputs[k] for k in ("up", "down", "up_bias", "down_bias")]
    call = (tokens, order, inputs["weights"], ends, *parameters)
    found = kept(lambda: op.reference(*call, activation=act.swiglu), cuda=False)
    assert op.extra is not None
    declared = order.nbytes + inputs["weights"].nbytes + ends.nbytes
    declared += op.extra(*call, activation=act.swiglu)
    assert distinct_bytes(found, parameters) == declared


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    inputs, experts = arguments(24, 16, 8), ROUTINGS["some refused"](24)
    found: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(found.append, lambda x: x):
        out = routed(inputs, experts, activation=act.swiglu)
    assert not found
    assert torch.equal(out, routed(inputs, experts, activation=act.swiglu))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_torch_counts_the_flops_that_are_declared(bias: bool, recompute: bool) -> None:
    inputs, op = arguments(24, 16, 8, bias=bias), OPS["routed_feed_forward"]
    order, ends = sort_by_expert(ROUTINGS["an expert idle"](24), EXPERTS)
    given = {"order": order, "ends": ends, **inputs}
    names = ("tokens", "order", "weights", "ends", "up", "down", "up_bias", "down_bias")
    call = [given[name] for name in names if name in given]
    options: dict[str, Any] = {"activation": act.swiglu, "recompute": recompute}
    with counter() as forward:
        out = op.reference(*call, **options)
    with counter() as backward:
        out.sum().backward()
    assert op.flops is not None
    assert callable(op.backward)
    declared = op.flops(*call, **options)
    assert forward.get_total_flops() == declared
    assert backward.get_total_flops() == declared * op.backward(*call, **options)


# Under torch's own machinery


def wrapped(activation: Run = act.swiglu, **options: Any) -> Run:
    def run(tokens: Tensor, weights: Tensor, up: Tensor, down: Tensor, *rest: Tensor) -> Tensor:
        *biases, experts = rest
        order, ends = sort_by_expert(experts, EXPERTS)
        given = (tokens, order, weights, ends, up, down, *biases)
        return routed_feed_forward(*given, activation=activation, **options)

    return run


# Dynamo itself makes the instance of a Function that torch warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_breaks_for_any_number_of_tokens(
    dtype: torch.dtype, recompute: bool
) -> None:
    torch._dynamo.reset()
    run = wrapped(recompute=recompute)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    near = 16 * torch.finfo(dtype).eps
    for t in (12, 30):
        inputs, experts = arguments(t, 15, 16, dtype=dtype), ROUTINGS["some refused"](t)
        expected = with_gradients(lambda: run(*inputs.values(), experts), inputs)  # noqa: B023
        actual = with_gradients(lambda: compiled(*inputs.values(), experts), inputs)  # noqa: B023
        for key, x in expected.items():
            scale = max(float(x.abs().max()), 1.0)
            torch.testing.assert_close(actual[key], x, rtol=near, atol=near * scale)


class Wrapped(torch.nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return wrapped()(*inputs)


def test_exports_with_a_free_number_of_tokens() -> None:
    tokens = torch.export.Dim("tokens", min=2)
    free = ({0: tokens}, {0: tokens}, None, None, None, None, {0: tokens})
    inputs = (*arguments(12, 15, 16).values(), ROUTINGS["some refused"](12))
    program = torch.export.export(Wrapped(), inputs, dynamic_shapes=(free,)).module()
    for t in (12, 30):
        inputs = (*arguments(t, 15, 16).values(), ROUTINGS["some refused"](t))
        torch.testing.assert_close(program(*inputs), Wrapped()(*inputs))


def test_runs_on_shapes_alone() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    inputs, experts = arguments(12, 16, 8), ROUTINGS["some refused"](12)
    with mode:
        fake = {k: mode.from_tensor(x) for k, x in inputs.items()}
        out = wrapped()(*fake.values(), mode.from_tensor(experts))
        out.sum().backward()
    assert out.shape == inputs["tokens"].shape
    for k, x in inputs.items():
        grad = fake[k].grad
        assert grad is not None
        assert grad.shape == x.shape


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    inputs, experts = arguments(40, 16, 8), ROUTINGS["some refused"](40)
    run = partial(wrapped(), *inputs.values(), experts)
    again = partial(checkpoint, wrapped(), *inputs.values(), experts, use_reentrant=reentrant)
    assert_same(backward_into(run, inputs), backward_into(again, inputs))


def backward_into(run: Callable[[], Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients as backward() leaves them, which reentrant checkpoints insist on."""
    for x in inputs.values():
        x.grad = None
    out = run()
    out.square().sum().backward()
    return {k: x.grad for k, x in inputs.items() if x.grad is not None} | {"out": out.detach()}


def test_autocast_computes_in_its_format() -> None:
    inputs, experts = arguments(40, 16, 8), ROUTINGS["some refused"](40)
    run = partial(routed, inputs, experts, activation=act.swiglu)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run()
        found = kept(run, cuda=False)
    assert out.dtype == torch.bfloat16
    assert not [x for x in found if x.dtype == torch.float32 and x.shape[-1] == 16]
    narrow = {k: x.detach().bfloat16().requires_grad_() for k, x in inputs.items()}
    narrow["weights"] = inputs["weights"]
    expected = with_gradients(lambda: routed(narrow, experts, activation=act.swiglu), narrow)
    actual = with_gradients(lambda: out, inputs)
    for name, x in expected.items():
        assert torch.equal(actual[name], x.to(actual[name].dtype)), name


def test_the_source_in_a_package_computes_the_same() -> None:
    text = ops_module({"routed_feed_forward", "sort_by_expert", "swiglu"})
    package: dict[str, Any] = {"__name__": "package_ops"}
    exec(compile(text, "package_ops", "exec"), package)
    inputs, experts = arguments(40, 16, 8), ROUTINGS["some refused"](40)

    def run() -> Tensor:
        order, ends = package["sort_by_expert"](experts, EXPERTS)
        out: Tensor = package["routed_feed_forward"](
            **inputs, order=order, ends=ends, activation=package["swiglu"]
        )
        return out

    expected = with_gradients(lambda: routed(inputs, experts, activation=act.swiglu), inputs)
    assert_same(with_gradients(run, inputs), expected)
