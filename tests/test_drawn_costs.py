"""Drawn specs of every part: emitted equals graph, and costs are what torch counts and keeps."""

from __future__ import annotations

from typing import Any

import torch
from counted_flops import expected, forward_and_backward
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from kept_memory import distinct_bytes, kept, own
from tiny_models import BATCH, LENGTH, filled, token_ids
from tiny_specs import moe, spec

import moegen
from moegen.errors import SpecError
from moegen.graph.execute import Executable, tensors
from moegen.planner import Plan


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


def mapping(**values: Any) -> st.SearchStrategy[dict[str, Any]]:
    """A section of a spec: what is no strategy is always there."""
    drawn = {k: v if isinstance(v, st.SearchStrategy) else st.just(v) for k, v in values.items()}
    return st.fixed_dictionaries(drawn)


ACTIVATIONS = (
    "swiglu",
    "geglu",
    "reglu",
    "clamped_swiglu",
    "relu",
    "relu2",
    "gelu",
    "silu",
    "cubic",
    "linear",
)
ROPES = (
    *(None, {"theta": 100.0}, {"dim": 2}, {"layout": "interleaved"}),
    *({"scaling": "llama3"}, {"scaling": {"kind": "linear", "factor": 2.0}}),
)
WINDOWS = (
    *(None, {"size": 1}, {"size": 5}, {"size": 40}, {"size": 3, "placement": {"every": 2}}),
    {"size": 3, "placement": {"every": 2, "offset": 1}, "rope": {"theta": 50.0}},
)
GATES = ("none", "sum", "softmax_over_kept", {"normalize": "sum", "scale": 2.0, "eps": 1e-9})
LOSSES = (
    *({}, {"balance": 0.1, "z": 0.1}, {"sequence_balance": 0.1}),
    *({"balance": {"weight": 0.1, "count": c}} for c in ("first", "all")),
    {"balance": {"weight": 0.1, "reduction": "pooled"}},
)
PRECISIONS = (
    *({}, {}, {"parameters": "bf16"}, {"compute": "bf16"}, {"parameters": "fp64"}),
    {"parameters": "bf16", "experts": "fp32", "cache": "fp32"},
)

grouped_query = mapping(
    kind="gqa",
    heads=one_of(2, 4),
    kv_heads=one_of(1, 2, None),
    head_dim=one_of(4, 6, 10),
    bias=one_of("none", "qkv", "all"),
    qk_norm=one_of("none", "head", "full"),
    clip=one_of(None, 2.0),
    scale=one_of(None, 0.3),
    rope=one_of(*ROPES),
    window=one_of(*WINDOWS),
) | mapping(
    kind="gqa",
    heads=4,
    kv_heads=one_of(1, 4),
    head_dim=4,
    rope=one_of(*ROPES),
    window=one_of(*WINDOWS),
    sinks=one_of(True, False),
    softcap=one_of(None, 20.0),
)
latent = mapping(
    kind="mla",
    heads=one_of(1, 2, 3),
    q_rank=one_of(None, 5),
    kv_rank=one_of(1, 4, 7),
    nope_dim=one_of(1, 4),
    rope_dim=one_of(2, 4),
    value_dim=one_of(3, 4, 8),
    rope=one_of({"theta": 100.0}, {"scaling": {"kind": "yarn", "factor": 4.0, "original": 8}}),
)
capacities = mapping(
    factor=one_of(0.5, 1.0, 2.0),
    convention=one_of("per_token", "per_choice"),
    minimum=one_of(0, 3),
    rounding=one_of("floor", "ceil", "nearest"),
    multiple=one_of(1, 4),
    eval_factor=one_of(None, 2.0),
)
experts = mapping(
    count=one_of(1, 4, 6),
    width=one_of(2, 4, 10),
    activation=one_of(*ACTIVATIONS),
    bias=one_of(True, False),
)
beside = {
    "experts": experts,
    "granularity": one_of(1, 2),
    "shared": one_of(None, 1, {"count": 2, "gate": True}),
    "residual": one_of(None, None, 6),
    "extra": one_of(None, None, 6),
    "placement": one_of({}, {"every": 2}, {"first_dense": 1}, {"last": 1}),
}
choosing_tokens = mapping(
    **beside,
    router=mapping(
        affinity=one_of("softmax", "sigmoid"),
        select=mapping(kind="expert_choice", factor=one_of(0.5, 1.0)),
    ),
)
choosing_experts = mapping(
    **beside,
    router=mapping(
        affinity=one_of("softmax", "sigmoid"),
        score=mapping(bias=one_of(True, False), cap=one_of(None, 10.0)),
        noise=one_of("none", "jitter"),
        balance_bias=one_of(None, 0.01),
        restrict=one_of(
            None, None, *({"groups": 2, "keep": 1, "by": by} for by in ("max", "top2_sum"))
        ),
        select=one_of(1, 2, 3),
        gate=one_of(*GATES),
    ),
    capacity=st.none() | capacities,
    losses=one_of(*LOSSES),
)
specs = st.builds(
    lambda model, **rest: spec("drawn", model, **rest),
    model=mapping(
        d_model=one_of(4, 12),
        layers=one_of(1, 2, 3),
        ffn=one_of(10, {"width": 6, "activation": "gelu", "bias": True}),
        norm=mapping(
            kind=one_of("rms", "layer"),
            placement=one_of("pre", "post", "output", "sandwich"),
            scale=one_of(True, True, False),
        ),
        attention=grouped_query | latent,
        moe=st.none() | choosing_experts | choosing_experts | choosing_tokens,
        residual_scale=one_of(1.0, 0.5),
        embedding=mapping(scale=one_of(1.0, "sqrt_d_model")),
        head=mapping(
            tied=one_of(True, False),
            bias=one_of(True, False),
            scale=one_of(1.0, 0.5),
            softcap=one_of(None, 5.0),
        ),
    ),
    precision=one_of(*PRECISIONS),
    train=mapping(dropout=mapping(dense=one_of(0.0, 0.1), experts=one_of(0.0, 0.2))),
)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(specs)
def test_a_drawn_model_computes_and_costs_what_its_plan_says(drawn: dict[str, Any]) -> None:
    try:
        plan = moegen.plan(drawn, batch=BATCH, sequence=LENGTH)
    except SpecError:
        assume(False)
    model, ids = filled(moegen.module(plan).Model), token_ids()
    saved = distinct_bytes(kept(lambda: model.train()(ids)), own(model, ids))
    assert plan.costs["forward"].saved == saved
    assert expected(plan) == forward_and_backward(model)
    same_as_the_graph(plan, model)
    if decodes_alike(drawn):
        decodes(model)


def same_as_the_graph(plan: Plan, model: Any) -> None:
    graph = Executable(plan.root)
    graph.load_state_dict(model.state_dict())
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [7]])
    for training in (True, False):
        torch.manual_seed(1)
        ours = tensors(model.train(training)(token_ids(), mask))
        torch.manual_seed(1)
        theirs = tensors(graph.train(training)(token_ids(), mask))
        assert all(map(torch.equal, ours, theirs))


def decodes_alike(drawn: dict[str, Any]) -> bool:
    """Not where experts see all tokens at once, capacity drops, or formats are rounded."""
    routed = drawn["model"]["moe"] or moe()
    chooses = not isinstance(routed["router"]["select"], dict)
    return chooses and not routed.get("capacity") and not drawn["precision"]


def decodes(model: Any) -> None:
    ids = token_ids()
    with torch.no_grad():
        whole, cache = model.eval()(ids).logits, model.new_cache(BATCH, 16)
        first = model.step(ids[:, :7], torch.tensor(0), cache)
        rest = [model.step(ids[:, i : i + 1], torch.tensor(i), cache) for i in range(7, LENGTH)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, rtol=1e-4, atol=1e-4)
