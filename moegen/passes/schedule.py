"""Finds what a program cannot run faster than: its longest chain of nodes under a roofline."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from torch import fx

from moegen.gpus import Gpu
from moegen.graph import meta
from moegen.graph.component import Component
from moegen.ops.op import op_of


@dataclass(frozen=True)
class Path:
    """The longest chain of a program: its seconds, all nodes' seconds, and the chain's nodes.

    The difference between the two is work beside the chain, such as shared experts beside
    routed ones, that a GPU with room left could overlap.
    """

    seconds: float
    total: float
    nodes: tuple[fx.Node, ...]


def critical_path(component: Component, program: str, gpu: Gpu) -> Path:
    """The longest path through a program, each node at the speed of light of a GPU.

    A node takes its FLOPs over the GPU's rate or its bytes over the bandwidth, whichever is
    longer (Williams et al. 2009). Needs a plan's costs on the nodes.
    """
    return _path(component, program, gpu, {})


def recurrent_steps(component: Component, program: str) -> int:
    """Steps of ops that wait for each other, such as those of time, along the longest chain."""
    longest: dict[fx.Node, int] = {}
    for node in component.programs[program].graph.nodes:
        before = max((longest[source] for source in node.all_input_nodes), default=0)
        longest[node] = before + _steps(component, node)
    return max(longest.values(), default=0)


def _steps(component: Component, node: fx.Node) -> int:
    if node.op == "call_module":
        return recurrent_steps(component.children[str(node.target)], meta.method(node))
    known = op_of(node.target)
    if known is None or known.steps is None:
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), meta.val)
    return known.steps(*args, **kwargs)


def _path(component: Component, program: str, gpu: Gpu, memo: dict[tuple[int, str], Path]) -> Path:
    key = (id(component), program)
    if key in memo:
        return memo[key]
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    total = 0.0
    for node in component.programs[program].graph.nodes:
        if node.op == "call_module":
            child = component.children[str(node.target)]
            below = _path(child, meta.method(node), gpu, memo)
            seconds, inside = below.seconds, below.total
        else:
            seconds = inside = _seconds(node, gpu)
        total += inside
        graph.add_node(node, weight=seconds)
        for source in node.all_input_nodes:
            graph.add_edge(source, node, weight=seconds)
    # Edges carry the time of the node they lead to; what starts a chain takes none itself.
    chain = nx.dag_longest_path(graph, weight="weight")
    memo[key] = Path(sum(graph.nodes[n]["weight"] for n in chain), total, tuple(chain))
    return memo[key]


def _seconds(node: fx.Node, gpu: Gpu) -> float:
    cost = node.meta.get(meta.COST)
    if cost is None:
        return 0.0
    return max(float(cost.flops) / gpu.flops, float(cost.moved) / gpu.bandwidth)
