"""Graphs bear their authors' names, belong to one plan, and break no rule unseen."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from tiny_specs import SPECS, moe, spec
from torch import fx

import moegen
from moegen.api import load
from moegen.graph import meta
from moegen.graph.component import Component
from moegen.graph.verify import verify
from moegen.planner import Plan, Workload, lower


def planned(name: str = "deepseek-v3-like") -> Plan:
    return moegen.plan(SPECS[name], sequence=8)


def component(plan: Plan, name: str) -> Component:
    return next(c for c in plan.components if c.class_name == name)


def names(graph: fx.Graph) -> list[str]:
    return [str(meta.name(n)) for n in graph.nodes if meta.name(n)]


def test_nodes_are_called_what_their_authors_call_them() -> None:
    found = names(component(planned(), "MoE").programs["forward"].graph)
    for name in ("tokens", "logits", "scores", "grouped", "rank", "best", "experts", "weights"):
        assert name in found
    for unpacked in ("order", "ends"):
        assert unpacked in found
    unfused = lower(load(SPECS["deepseek-v3-like"]), Workload(1, 8))
    found = names(component(unfused, "MoE").programs["forward"].graph)
    for unpacked in ("gate", "up"):
        assert unpacked in found


def test_names_come_through_helpers_and_tuples() -> None:
    found = names(component(planned(), "LatentAttention").programs["forward"].graph)
    assert {"q", "q_nope", "q_rope", "latent", "k_rope", "expanded", "out"} <= set(found)


def test_every_node_knows_its_section_of_the_spec() -> None:
    plan = planned()
    paths = {
        meta.origin(n).path
        for n in component(plan, "MoE").programs["forward"].graph.nodes
        if n.op == "call_function"
    }
    for part in ("score", "affinity", "restrict", "select", "gate"):
        expected = ("model", "moe", "router", part)
        assert expected in paths or part == "affinity"


def test_two_plans_share_no_graph() -> None:
    one, two = planned(), planned()
    for a, b in zip(one.components, two.components, strict=True):
        for program in a.programs:
            assert a.programs[program] is not b.programs[program]
            nodes = set(a.programs[program].graph.nodes)
            assert not nodes & set(b.programs[program].graph.nodes)


def test_a_plan_does_not_grow_with_experts_or_depth() -> None:
    def size(layers: int, experts: int) -> tuple[int, int]:
        model = {"layers": layers, "moe": moe(experts={"count": experts, "width": 16})}
        plan = moegen.plan(spec("sized", model), sequence=8)
        inner = [c for c in plan.components if c is not plan.root]
        nodes = sum(len(p.graph.nodes) for c in inner for p in c.programs.values())
        return len(inner), nodes

    assert size(2, 8) == size(60, 2048)


def broken(change: Any) -> str:
    plan = planned("plain-moe")
    target = component(plan, "Attention")
    graph = target.programs["forward"].graph
    change(graph, target)
    with pytest.raises(AssertionError) as caught:
        verify(plan.root)
    return str(caught.value)


def some(graph: fx.Graph, op: str) -> fx.Node:
    return next(n for n in graph.nodes if n.op == op and n.users)


def test_verify_finds_what_works_in_place() -> None:
    def change(graph: fx.Graph, _: Component) -> None:
        some(graph, "call_method").target = "transpose_"

    assert "works in place" in broken(change)


def test_verify_finds_unknown_functions() -> None:
    def change(graph: fx.Graph, _: Component) -> None:
        some(graph, "call_function").target = print

    assert "neither an op nor a public torch function" in broken(change)


def test_verify_finds_dead_nodes_and_missing_origins() -> None:
    def dead(graph: fx.Graph, _: Component) -> None:
        source = some(graph, "call_function")
        with graph.inserting_after(source):
            made = graph.call_function(torch.relu, (source,))
        made.meta[meta.ORIGIN] = meta.origin(source)

    def unsigned(graph: fx.Graph, _: Component) -> None:
        del some(graph, "call_function").meta[meta.ORIGIN]

    assert "is dead" in broken(dead)
    assert "has no origin" in broken(unsigned)


def test_verify_finds_foreign_attributes_and_children() -> None:
    def attribute(graph: fx.Graph, _: Component) -> None:
        some(graph, "get_attr").target = "somebody_elses"

    assert "no parameter or buffer of this component" in broken(attribute)
    plan = planned("plain-moe")
    some(plan.root.programs["forward"].graph, "call_module").target = "layers.99"
    with pytest.raises(AssertionError, match="which is no child"):
        verify(plan.root)


def test_verify_finds_reading_before_making() -> None:
    def change(graph: fx.Graph, _: Component) -> None:
        first, *_, last = [n for n in graph.nodes if n.op == "call_function"]
        first.args = (last, *first.args[1:])

    assert "before it is made" in broken(change)


def test_operators_are_not_taken_for_functions_in_place() -> None:
    assert operator.and_.__name__.endswith("_")
    verify(planned("windowed").root)  # its masks are made with &
