"""The rewrites of a plan for kernels: what becomes one op, and how wide experts read their rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moegen.graph import meta
from moegen.graph.component import Component, Weight
from moegen.graph.fault import Fault
from moegen.ops.experts import grouped_linear
from moegen.ops.feed_forward import grouped_feed_forward, routed_feed_forward
from moegen.ops.feed_forward_work import grouped_work, routed_work
from moegen.passes.fusions.experts import experts_fusion
from moegen.passes.fusions.router import fuse_router
from moegen_triton.kernels.chips import CHIPS
from moegen_triton.kernels.costs import permutes

# Activations that kernels know; others stay a node of their own between two products.
GATED = {"swiglu", "geglu", "reglu", "clamped_swiglu"}
PLAIN = {"relu", "relu2", "gelu", "silu", "cubic", "identity"}
ACTIVATIONS = frozenset(GATED | PLAIN)


def check_formats(component: Component, graph: fx.Graph) -> None:
    """Refuse experts in fp64, which kernels do not compute in."""
    products = (n for n in graph.nodes if n.target is grouped_linear)
    if any(weight_behind(component, n.args[1]).dtype == torch.float64 for n in products):
        sentence = "there are no Triton kernels for fp64; use fp32, or -b eager"
        raise Fault(sentence, ("precision",), "")


def weight_behind(component: Component, node: Any) -> Weight:
    """The parameter that a node is, or has the values of: in another format, or scaled backward."""
    while node.op != "get_attr":
        node = node.args[0]
    return component.weights[str(node.target)]


def permute_wide(component: Component, graph: fx.Graph) -> None:
    """Rows of wide experts are copied into their order once, and read as whole tiles then.

    The copy costs r / n of the products' time (costs.permutes), so it pays where n is large.
    """
    for node in graph.nodes:
        if node.target is routed_feed_forward:
            width = weight_behind(component, node.args[5]).shape[2]
            if permutes(width, CHIPS[90]):
                node.kwargs = {**node.kwargs, "permute": True}


def count_workspace(component: Component, graph: fx.Graph) -> None:
    """Note what kernels need while they run, which is less than plain PyTorch does."""
    for node in graph.nodes:
        if node.target is routed_feed_forward:
            node.meta[meta.INSIDE] = _routed
        if node.target is grouped_feed_forward:
            node.meta[meta.INSIDE] = _grouped


def _routed(*args: Any, permute: bool = False, **named: Any) -> tuple[int, int]:
    """Of rows: activations and outputs forward; backward gradients of both products' inputs."""
    work = routed_work(*args, **named)
    wide, d, n = work.up.shape[1], work.down.shape[1], work.down.shape[2]
    copies = d if permute else 0
    backward = wide + n + d + 2 * copies + (wide if work.recompute else 0)
    size = work.up.element_size() * work.rows
    return max(n + d, copies + n) * size, backward * size


def _grouped(*args: Any, **named: Any) -> tuple[int, int]:
    """The same, where rows in and out are counted as values of the graph."""
    work = grouped_work(*args, **named)
    wide, n = work.up.shape[1], work.down.shape[2]
    size = work.up.element_size() * work.rows
    return n * size, (wide + n + (wide if work.recompute else 0)) * size


FUSIONS = (
    check_formats,
    experts_fusion(ACTIVATIONS.__contains__),
    fuse_router,
    permute_wide,
    count_workspace,
)
