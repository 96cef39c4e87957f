"""What plans say of memory against what autograd keeps, and against formulas by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kept_memory import distinct_bytes, kept, own
from tiny_models import BATCH, LENGTH, VOCABULARY, made, planned, token_ids
from tiny_specs import SPECS, moe, spec
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import moegen
from moegen.arch.latent_attention import LatentAttention
from moegen.estimator import weights
from moegen.graph import meta
from moegen.graph.builder import Trace
from moegen.graph.component import Component, Init, Weight
from moegen.graph.execute import tensors
from moegen.graph.layer import Layer
from moegen.ops import attention, losses
from moegen.ops.op import op_of
from moegen.ops.torch_costs import SAVES
from moegen.optimizers import OPTIMIZERS
from moegen.passes.cost import Costs
from moegen.passes.gradients import floating_inputs
from moegen.passes.refs import size
from moegen.passes.shapes import Shapes
from moegen.planner import Plan

NAMES = sorted(SPECS)
TOKENS = BATCH * LENGTH
SPEC_FILES = Path(__file__).parent.parent / "specs"

# Where formats differ from op to op, as no tiny spec has them.
ALSO = {
    "expert choice in bf16": spec(
        "expert-choice-bf16",
        {"moe": moe(router={"select": {"kind": "expert_choice", "factor": 2.0}})},
        precision={"parameters": "bf16"},
    ),
    "layer norm in mixed formats": spec(
        "mixed-layer-norm",
        {"norm": {"kind": "layer"}, "moe": moe(shared=1)},
        precision={"compute": "bf16"},
    ),
    "loss on logits": spec("output-z", {"head": {"z_loss": 0.1}}),
    "loss on logits in bf16": spec(
        "output-z-bf16", {"head": {"z_loss": 0.1}}, precision={"parameters": "bf16"}
    ),
    "short sequence in a long window": spec(
        "wide-window", {"attention": {"heads": 4, "kv_heads": 2, "window": 40}}
    ),
    "sinks for every head": spec("sinks", {"attention": {"heads": 4, "sinks": True}}),
    "soft cap in a window": spec(
        "capped-window",
        {"attention": {"heads": 4, "kv_heads": 2, "softcap": 20.0, "window": 7}},
    ),
    "sinks without rope": spec(
        "sinks-no-rope", {"attention": {"heads": 4, "kv_heads": 2, "sinks": True, "rope": None}}
    ),
    "norms of heads that do not turn": spec(
        "norms-no-rope",
        {"attention": {"heads": 4, "kv_heads": 2, "qk_norm": "head", "rope": None}},
    ),
    "latent attention in fp64": spec(
        "latent-fp64",
        {"attention": SPECS["deepseek-v3-like"]["model"]["attention"]},
        precision={"parameters": "fp64"},
    ),
    "no scale in norms": spec("unscaled", {"norm": {"kind": "rms", "scale": False}}),
}


# What autograd keeps


@pytest.mark.parametrize("name", [*NAMES, *ALSO])
def test_saved_bytes_are_what_autograd_keeps(name: str) -> None:
    source = ALSO.get(name, name)
    model, ids = made(source).train(), token_ids()
    found = kept(lambda: model(ids))
    assert planned(source).costs["forward"].saved == distinct_bytes(found, own(model, ids))


def test_logits_that_both_losses_read_are_estimated_once() -> None:
    def saved(name: str, head: dict[str, float]) -> int:
        lines = moegen.estimate(planned(spec(name, {"head": head}))).training.lines
        return next(line.bytes for line in lines if line.name == "saved activations")

    log_partition_and_weight = 4 * (2 * TOKENS + 1)
    assert saved("z", {"z_loss": 0.1}) - saved("no-z", {}) == log_partition_and_weight


def test_cpu_keeps_a_copy_more_of_every_norm() -> None:
    """Without stand-ins the difference is the normalised values of the five norms."""
    model, ids = made("dense").train(), token_ids()
    found = distinct_bytes(kept(lambda: model(ids), cuda=False), own(model, ids))
    assert found - planned("dense").costs["forward"].saved == 5 * 4 * TOKENS * 32


def test_saved_bytes_grow_with_the_batch_as_autograds_do() -> None:
    model, ids = made("plain-moe").train(), token_ids(batch=3, length=20)
    found = kept(lambda: model(ids))
    expected = planned("plain-moe", 3, 20).costs["forward"].saved
    assert expected == distinct_bytes(found, own(model, ids))


@pytest.mark.parametrize("name", ["dense", "plain-moe", "deepseek-v3-like", "switch-like"])
def test_checkpointed_layers_keep_their_inputs_alone(name: str) -> None:
    model, ids = made(name).train(), token_ids()
    model.checkpoint_layers()
    held: list[Tensor] = []  # what checkpoint is given, which it holds outside of autograd

    def noting(whole: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*inputs: Any) -> Any:
            held.extend(tensors(inputs))
            return whole(*inputs)

        return forward

    for layer in model.layers:
        layer.forward = noting(layer.forward)
    found = kept(lambda: model(ids))
    expected = planned(name).costs["forward, checkpointed"].saved
    assert expected == distinct_bytes([*found, *held], own(model, ids))
    assert expected < planned(name).costs["forward"].saved / 2


@pytest.mark.parametrize("name", ["dense", "bf16", "fp64"])
def test_the_loss_keeps_what_autograd_keeps(name: str) -> None:
    model, ids = made(name), token_ids()
    dtype = next(model.parameters()).dtype
    logits = torch.randn(BATCH, LENGTH, VOCABULARY, dtype=dtype, requires_grad=True)
    found = kept(lambda: model.loss(logits, ids))
    assert planned(name).costs["loss"].saved == distinct_bytes(found, [logits, ids])


# One function at a time


FUNCTIONS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "add": lambda x, y, i, m: x + y,
    "product": lambda x, y, i, m: x * y,
    "product with a constant": lambda x, y, i, m: x * 2.0,
    "product with itself": lambda x, y, i, m: x * x,
    "quotient": lambda x, y, i, m: x / y,
    "quotient by a constant": lambda x, y, i, m: x / 2.0,
    "constant by it": lambda x, y, i, m: 2.0 / (y + 1.0),
    "power": lambda x, y, i, m: x**3,
    "matrix product": lambda x, y, i, m: x @ y.transpose(1, 2),
    "torch.matmul": lambda x, y, i, m: torch.matmul(x, y.transpose(1, 2)),
    "torch.bmm": lambda x, y, i, m: torch.bmm(x, y.transpose(1, 2)),
    "F.linear": lambda x, y, i, m: F.linear(x, y.flatten(0, 1)),
    "F.embedding": lambda x, y, i, m: F.embedding(i, x.flatten(0, 1)),
    "F.silu": lambda x, y, i, m: F.silu(x + y),
    "F.gelu": lambda x, y, i, m: F.gelu(x + y),
    "F.gelu by tanh": lambda x, y, i, m: F.gelu(x + y, approximate="tanh"),
    "F.relu": lambda x, y, i, m: F.relu(x + y),
    "F.softplus": lambda x, y, i, m: F.softplus(x + y),
    "F.layer_norm": lambda x, y, i, m: F.layer_norm(x + y, (8,), weight=y[0, 0]),
    "F.layer_norm, bias": lambda x, y, i, m: F.layer_norm(x + y, (8,), y[0, 0], y[0, 1]),
    "F.rms_norm": lambda x, y, i, m: F.rms_norm(x + y, (8,), weight=y[0, 0], eps=1e-6),
    "F.dropout": lambda x, y, i, m: F.dropout(x + y, p=0.5, training=True),
    "torch.sigmoid": lambda x, y, i, m: torch.sigmoid(x + y),
    "torch.tanh": lambda x, y, i, m: torch.tanh(x + y),
    "torch.logsumexp": lambda x, y, i, m: torch.logsumexp(x + y, -1),
    "sigmoid": lambda x, y, i, m: (x + y).sigmoid(),
    "tanh": lambda x, y, i, m: (x + y).tanh(),
    "softmax": lambda x, y, i, m: (x + y).softmax(-1),
    "square": lambda x, y, i, m: (x + y).square(),
    "exp": lambda x, y, i, m: (x + y).exp(),
    "clamp": lambda x, y, i, m: (x + y).clamp(-1, 1),
    "masked_fill": lambda x, y, i, m: (x + y).masked_fill(~m, 0.0),
    "gather": lambda x, y, i, m: (x + y).gather(-1, i.unsqueeze(-1)),
    "scatter": lambda x, y, i, m: x.scatter(-1, i.unsqueeze(-1), y[..., :1]),
    "amax": lambda x, y, i, m: (x + y).amax(-1),
    "topk": lambda x, y, i, m: (x + y).topk(2, dim=-1).values,
    "sum": lambda x, y, i, m: (x + y).sum(-1, keepdim=True),
    "mean": lambda x, y, i, m: (x + y).mean(-1),
    "rows by index": lambda x, y, i, m: (x + y)[i[0]],
    "log_softmax": lambda x, y, i, m: (x + y).log_softmax(-1),
    "conv2d": lambda x, y, i, m: F.conv2d(x.unsqueeze(0), y[:, :2, :2].unsqueeze(0) * 2.0),
    "new_ones": lambda x, y, i, m: (x + y) * (x + y).new_ones((3, 4, 8)),
    "cat": lambda x, y, i, m: torch.cat((x, y), -1),
    "stack": lambda x, y, i, m: torch.stack((x, y)),
    "chunk": lambda x, y, i, m: (x * y).chunk(2, -1)[0] * 2.0,
    "split": lambda x, y, i, m: F.silu((x * y).split_with_sizes([3, 5], -1)[1]),
    "views": lambda x, y, i, m: F.silu((x * y).transpose(0, 1).unflatten(-1, (2, 4))),
    "copy of a view": lambda x, y, i, m: F.silu((x * y).transpose(0, 1).flatten(0, 1)),
    "expand": lambda x, y, i, m: F.silu((x + y).unsqueeze(0).expand(5, -1, -1, -1)),
    "to": lambda x, y, i, m: F.silu((x + y).to(torch.bfloat16)),
    "view_as": lambda x, y, i, m: F.silu((x + y).flatten().view_as(y)),
    "attention": lambda x, y, i, m: F.scaled_dot_product_attention(
        x.unsqueeze(0), y.unsqueeze(0), (x + y).unsqueeze(0), is_causal=True
    ),
    "window_attention": lambda x, y, i, m: attention.window_attention(
        x.unsqueeze(0), y.unsqueeze(0), (x + y).unsqueeze(0), 3, 0.5
    ),
    "sink_attention": lambda x, y, i, m: attention.sink_attention(
        x.unsqueeze(0), y.unsqueeze(0), (x + y).unsqueeze(0), y[:, 0, 0], 0.5
    ),
    "sink_attention in a window": lambda x, y, i, m: attention.sink_attention(
        x.unsqueeze(0), y.unsqueeze(0), (x + y).unsqueeze(0), y[:, 0, 0], 0.5, window=3
    ),
    "capped_attention": lambda x, y, i, m: attention.capped_attention(
        x.unsqueeze(0), y[:1].unsqueeze(0), (x + y)[:1].unsqueeze(0), 5.0, 0.5
    ),
    "capped_attention in a window": lambda x, y, i, m: attention.capped_attention(
        x.unsqueeze(0), y[:1].unsqueeze(0), (x + y)[:1].unsqueeze(0), 5.0, 0.5, window=2
    ),
    "masked_mean": lambda x, y, i, m: losses.masked_mean((x + y).flatten(0, 1), m.flatten()),
    "z_loss": lambda x, y, i, m: losses.z_loss((x + y).flatten(0, 1), m.flatten()),
    "balance_loss": lambda x, y, i, m: losses.balance_loss(x[0, 0] * 2.0, y[0, 0] * 2.0),
    "sequence_balance_loss": lambda x, y, i, m: losses.sequence_balance_loss(
        (x + y).flatten(0, 1), i.flatten().unsqueeze(-1), m.flatten(), 3
    ),
}


class Probe(Layer):
    """One function, as an element would call it."""

    function: str

    def forward(self, b: Any, x: Any, y: Any, index: Any, mask: Any) -> Any:
        return FUNCTIONS[self.function](x, y, index, mask)


def probe(name: str) -> Component:
    element = Probe(function=name)
    return Trace(planned("dense").spec).component(element, ("model",), "other")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_keeps_what_is_declared(name: str) -> None:
    torch.manual_seed(0)
    x, y = (torch.rand(3, 4, 8, requires_grad=True) for _ in range(2))
    index, mask = torch.zeros(3, 4, dtype=torch.int64), torch.ones(3, 4, 1, dtype=torch.bool)
    inputs, root = {"x": x, "y": y, "index": index, "mask": mask}, probe(name)
    mode = FakeTensorMode()
    Shapes(mode).run(root, "forward", tuple(mode.from_tensor(t) for t in inputs.values()))
    summary = Costs().of(root)
    whole = {ref.node.name for ref in summary.kept if ref.node.op == "placeholder"}
    declared = summary.saved + sum(inputs[key].nbytes for key in whole)
    assert declared == distinct_bytes(kept(lambda: FUNCTIONS[name](x, y, index, mask)))


def torch_functions(component: Component) -> set[str]:
    """Names of torch's own functions and methods in the forward pass that gradients go through."""
    nodes = list(component.programs["forward"].graph.nodes)
    inputs = floating_inputs(component, "forward")
    flows = Costs().program(component, "forward", inputs).grads
    calls = (n for n in nodes if n.op in ("call_function", "call_method") and flows[n])
    return {word(n.target) for n in calls if not op_of(n.target) and not is_record(n.target)}


def is_record(target: Any) -> bool:
    return hasattr(target, "_fields")


def word(target: Any) -> str:
    return str(getattr(target, "__name__", target))


def test_every_function_of_torch_that_specs_lead_to_is_tried_above() -> None:
    tried = {
        word(n.target) for name in FUNCTIONS for n in probe(name).programs["forward"].graph.nodes
    }
    assert {word(target) for target in SAVES} <= tried
    components = [c for name in NAMES for c in planned(name).components if "forward" in c.programs]
    assert set().union(*map(torch_functions, components)) <= tried | {"getattr"}


# Formulas by hand


def moe_saved(plan: Plan) -> int:
    """Bytes that the first routed layer keeps, its input included."""
    layer = next(c for c in plan.components if c.class_name == "MoE")
    summary = Costs().of(layer)
    inputs = (ref.node for ref in summary.kept if ref.node.op == "placeholder")
    return summary.saved + sum(size(meta.val(node)) for node in inputs)


def test_a_routed_layer_keeps_the_terms_of_the_formula() -> None:
    tokens, k, d, n, experts = TOKENS, 2, 32, 16, 8
    rows = 4 * tokens * (d + 2 * k * n)  # x, and the first product of each row, gate and up
    scores = 4 * tokens * experts
    choices = (8 + 8 + 4) * tokens * k  # experts, order, weights
    ends, mean = 4 * experts, 4 * (tokens + 1)
    assert moe_saved(planned("plain-moe")) == rows + scores + choices + ends + mean


@pytest.mark.parametrize(("recompute", "per_row"), [(False, 4), (True, 0)])
def test_a_routed_layer_in_bf16_keeps_2d_and_4kn_bytes_a_token(
    recompute: bool, per_row: int
) -> None:
    """Tokens and the first product, or tokens alone; and what the router keeps."""
    tokens, d, n, experts, k = 1024, 512, 256, 16, 4
    sizes: dict[str, Any] = {"experts": {"count": experts, "width": n}, "router": {"select": k}}
    sizes["experts"]["recompute"] = recompute
    source = spec(
        "measured",
        {"d_model": d, "max_sequence": tokens, "layers": 1, "moe": sizes, "vocab_size": 64},
        precision={"parameters": "bf16"},
    )
    source["model"]["attention"] = {"heads": 8}
    router = 4 * tokens * (d + experts) + 4 * (tokens + 1)  # tokens in fp32, scores, their mean
    choices = (8 + 8 + 4) * tokens * k + 4 * experts  # experts, order, weights; ends
    experts_keep = tokens * (2 * d + per_row * k * n)
    assert moe_saved(planned(source, 1, tokens)) == experts_keep + choices + router


@pytest.mark.parametrize(
    ("name", "per_token"), [("mixtral-8x7b", 131_072), ("deepseek-v3", 70_272)]
)
def test_a_cache_takes_the_published_bytes_a_token(name: str, per_token: int) -> None:
    plan = moegen.plan(SPEC_FILES / f"{name}.yaml", batch=2, sequence=16)
    assert size(plan.results["new_cache"]) == 2 * 16 * per_token


def test_the_cache_of_grouped_heads_is_two_per_head_and_position() -> None:
    layers, groups, width = 2, 2, 8
    expected = 2 * layers * groups * width * 4 * TOKENS
    assert size(planned("dense").results["new_cache"]) == expected


def test_the_cache_of_latent_attention_is_one_latent_and_one_rotary_key() -> None:
    for name in NAMES:
        model = planned(name).spec.model
        if isinstance(model.attention, LatentAttention):
            width = model.attention.kv_rank + model.attention.rope_dim
            expected = model.layers * width * 4 * TOKENS
            assert size(planned(name).results["new_cache"]) == expected


def test_layers_with_a_window_keep_no_more_than_the_window() -> None:
    groups, width, window = 2, 8, 5
    one = 2 * groups * width * 4 * BATCH
    expected = 2 * one * LENGTH + 2 * one * window  # two full layers and two with a window
    assert size(planned("gpt-oss-like").results["new_cache"]) == expected
    short = planned("gpt-oss-like", BATCH, 3)
    assert size(short.results["new_cache"]) == 4 * one * 3


def test_the_cache_has_a_format_of_its_own() -> None:
    bf16 = spec("cached", {}, precision={"cache": "bf16"})
    plain = size(planned("dense").results["new_cache"])
    assert 2 * size(planned(bf16).results["new_cache"]) == plain


@pytest.mark.parametrize("name", NAMES)
def test_the_model_makes_the_cache_that_is_planned(name: str) -> None:
    cache = made(name).new_cache(BATCH, LENGTH)
    assert sum(x.nbytes for x in tensors(cache)) == size(planned(name).results["new_cache"])


# Parameters, gradients, optimizers


def matrix(dtype: torch.dtype, role: str = "dense") -> Weight:
    return Weight((256, 512), dtype, role, Init("normal_"))


def per_parameter(optimizer: str, weight: Weight) -> float:
    scheme = OPTIMIZERS[optimizer]
    return (weight.bytes + scheme.gradient(weight) + scheme.state(weight)) / weight.count


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("optimizer", "dtype", "expected"),
    [
        ("adamw-mixed", BF16, 2 + 2 + 12),
        ("adamw-mixed", FP32, 4 + 4 + 8),
        ("adamw", BF16, 2 + 2 + 4),
        ("adamw", FP32, 4 + 4 + 8),
        ("adamw-8bit", BF16, 2 + 2 + 2 + 2 * 4 / 256),
        ("muon", BF16, 2 + 2 + 8),
        ("muon", FP32, 4 + 4 + 4),
        ("sgd", BF16, 2 + 2 + 2),
        ("sgd", FP32, 4 + 4 + 4),
    ],
)
def test_optimizers_keep_the_published_bytes_a_parameter(
    optimizer: str, dtype: torch.dtype, expected: float
) -> None:
    assert per_parameter(optimizer, matrix(dtype)) == expected


def test_muon_leaves_tables_norms_and_routers_to_adam() -> None:
    for role in ("embedding", "head", "norms", "router"):
        assert per_parameter("muon", matrix(BF16, role)) == 16
    assert per_parameter("muon", Weight((64,), BF16, "attention", Init("zeros_"))) == 16
    experts = Weight((8, 64, 32), BF16, "routed_experts", Init("normal_"))
    assert per_parameter("muon", experts) == 12


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", torch.optim.AdamW),
        ("sgd", lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)),
    ],
)
def test_torchs_optimizers_keep_what_is_declared(
    name: str, make: Callable[[Any], Any], dtype: torch.dtype
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(256, 512, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter])
    optimizer.step()
    state = optimizer.state[parameter].values()
    found = sum(x.nbytes for x in state if isinstance(x, Tensor) and x.dim())
    assert found == OPTIMIZERS[name].state(matrix(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_lines_of_the_estimate_are_those_of_the_model(name: str) -> None:
    model, plan = made(name), planned(name)
    lines = {
        line.name: line.bytes for line in moegen.estimate(plan, optimizer="adamw").training.lines
    }
    parameters = sum(p.nbytes for p in model.parameters())
    assert lines["parameters"] == lines["gradients"] == parameters
    assert lines["optimizer state"] == 2 * parameters
    assert sum(w.count * n for w, n in weights(plan.root)) == model.num_parameters()
    forward, loss = plan.costs["forward"], plan.costs["loss"]
    logits = size(plan.results["forward"].logits)
    assert lines["saved activations"] == forward.saved + logits + loss.saved
