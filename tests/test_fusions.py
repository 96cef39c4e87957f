"""Fusions compute what they replace, replace what they can, and say what they replaced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from routing_specs import ROUTED
from tiny_models import BATCH, LENGTH, token_ids
from tiny_specs import SPECS
from torch import Tensor, fx

from moegen.api import load
from moegen.graph import meta
from moegen.graph.execute import Executable, tensors
from moegen.ops.experts import grouped_linear
from moegen.passes.fuse import Fusion
from moegen.passes.fusions.experts import fuse_experts
from moegen.passes.fusions.router import fuse_router
from moegen.planner import Plan, Workload, lower

FUSIONS: tuple[Fusion, ...] = (fuse_experts, fuse_router)
MASK = torch.arange(LENGTH) < torch.tensor([[LENGTH], [9]])
ALL: dict[str, Any] = {**SPECS, **ROUTED}


def lowered(spec: Any, fusions: tuple[Fusion, ...]) -> Plan:
    return lower(load(spec), Workload(BATCH, LENGTH), fusions)


def nodes(plan: Plan) -> Iterator[fx.Node]:
    for component in plan.components:
        for program in component.programs.values():
            yield from program.graph.nodes


def named(plan: Plan, name: str) -> list[fx.Node]:
    return [n for n in nodes(plan) if getattr(n.target, "__name__", "") == name]


def pair(spec: Any) -> tuple[Plan, Executable, Executable]:
    """A plan, and the same model with and without fusions."""
    plan = lowered(spec, ())
    torch.manual_seed(0)
    plain, fused = Executable(plan.root), Executable(lowered(spec, FUSIONS).root)
    plain.reset_parameters()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    fused.load_state_dict(plain.state_dict())
    return plan, plain, fused


def run(model: Executable, plan: Plan, mask: Tensor | None) -> Any:
    torch.manual_seed(3)
    given = (torch.tensor([0, 1]) for _ in plan.spec.model.given())
    return model(token_ids(), mask, *given)


def learn(model: Executable, plan: Plan, mask: Tensor | None) -> list[Tensor]:
    """All an output holds, then every gradient."""
    model.zero_grad()
    out = run(model, plan, mask)
    loss = out.logits.float().square().mean() + sum(getattr(out, "losses", {}).values())
    loss.backward()
    return [*tensors(out), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", sorted(ALL))
def test_fused_is_unfused(name: str) -> None:
    plan, plain, fused = pair(ALL[name])
    rough = 3e-2 if plan.spec.precision.compute_dtype == torch.bfloat16 else 2e-4
    for training in (True, False):
        plain.train(training)
        fused.train(training)
        for mask in (None, MASK):
            expected, actual = learn(plain, plan, mask), learn(fused, plan, mask)
            for a, b in zip(actual, expected, strict=True):
                scale = b.float().abs().amax().item() if b.numel() else 0.0
                torch.testing.assert_close(a, b, rtol=rough, atol=rough * scale + 1e-7)


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_network_of_experts_is_one_op(name: str) -> None:
    plan = lowered(ALL[name], FUSIONS)
    if any(n.target == "dropout" or "dropout" in str(n.target) for n in nodes(plan)):
        return
    for node in (n for n in nodes(plan) if n.target is grouped_linear):
        # What is left is a product of a router with a matrix for each expert.
        assert str(node.args[1].target).startswith("inner_"), node  # type: ignore[union-attr]


def test_what_a_fusion_replaced_is_said() -> None:
    plan = lowered(SPECS["plain-moe"], FUSIONS)
    (forward, _) = named(plan, "routed_feed_forward")
    chain = ("gather_rows", "grouped_linear", "chunk", "getitem", "getitem", "swiglu")
    assert forward.meta[meta.FUSED] == (*chain, "grouped_linear", "combine")
    (router, _) = named(plan, "route")
    assert router.meta[meta.FUSED][:2] == ("linear", "softmax")
    assert meta.origin(forward).path == ("model", "moe")


def test_dropout_between_products_keeps_them_apart() -> None:
    plan = lowered({**SPECS["plain-moe"], "train": {"dropout": {"experts": 0.1}}}, FUSIONS)
    assert len(named(plan, "grouped_linear")) == 4
    assert not named(plan, "routed_feed_forward")


def test_a_router_in_16_bits_keeps_its_own_product() -> None:
    precision = {"parameters": "bf16", "router": "bf16"}
    plan = lowered({**SPECS["plain-moe"], "precision": precision}, FUSIONS)
    assert not named(plan, "route")
    assert named(plan, "routed_feed_forward")


@pytest.mark.parametrize("value", ["hidden", "rows", "order"])
def test_what_is_read_elsewhere_is_not_fused_away(value: str) -> None:
    """A network whose inside another node reads keeps that inside."""
    plan = lowered(SPECS["plain-moe"], ())
    (component,) = [c for c in plan.components if c.class_name == "MoE"]
    graph = component.programs["step"].graph
    inside = {"hidden": "swiglu", "rows": "gather_rows", "order": "sort_by_expert"}[value]
    node = next(n for n in graph.nodes if getattr(n.target, "__name__", "") == inside)
    last = next(n for n in graph.nodes if n.op == "output")
    last.args = ((last.args[0], node),)
    fuse_experts(component, graph)
    left = [getattr(n.target, "__name__", "") for n in graph.nodes]
    assert inside in left
    assert ("routed_feed_forward" in left) == (value == "order")
    assert ("grouped_feed_forward" in left) == (value == "rows")
