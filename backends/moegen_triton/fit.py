"""What this backend says of a plan: what it decided, what it has no kernel for, what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import fx

from moegen.errors import Problem
from moegen.graph import meta
from moegen.graph.component import Component
from moegen.ops.experts import grouped_linear
from moegen.ops.feed_forward import routed_feed_forward
from moegen.ops.op import op_of
from moegen.planner import Plan
from moegen_triton.emit import KERNELS
from moegen_triton.fusions import weight_behind


def needs(plan: Plan) -> Iterator[Problem]:
    """What a machine lacks to run kernels."""
    if find_spec("triton") is None:
        yield Problem("triton is not installed", hint="pip install triton")
    if not torch.cuda.is_available():
        hint = "TRITON_INTERPRET=1 runs the kernels on a CPU, slowly"
        yield Problem("the kernels need an NVIDIA GPU, and there is none here", hint=hint)
    elif torch.cuda.get_device_capability() < (8, 0):
        yield Problem("the kernels need compute capability 8.0 or later")


def lacks(plan: Plan) -> Iterator[Problem]:
    """Ops with products, or of experts' rows, that are emitted as plain PyTorch; each once."""
    seen: set[str] = set()
    for component, node in _nodes(plan):
        if node.target is grouped_linear and "apart" not in seen:
            weight = weight_behind(component, node.args[1])
            if weight.role == "routed_experts":
                seen.add("apart")
                path = meta.origin(node).path
                yield Problem(_APART, plan.mark(path), path, hint=_STRICT)
        known = op_of(node.target)
        if known is None or known.name in KERNELS or known.name in seen:
            continue
        cost = node.meta.get(meta.COST)
        if (cost is not None and cost.flops) or known.name in _WORK:
            seen.add(known.name)
            path = meta.origin(node).path
            sentence = f"there is no Triton kernel for {known.name}: it is plain PyTorch"
            yield Problem(sentence, plan.mark(path), path, hint=_STRICT)


_STRICT = "--strict makes this an error"
_APART = (
    "experts are not one op: between their products stands dropout, or an activation without a "
    "kernel, in plain PyTorch; recompute has no effect there"
)
# Ops without products that move all of an expert's rows.
_WORK = {"combine_rows"}


def says(plan: Plan) -> Iterator[Problem]:
    """How experts read their rows, once for each width."""
    seen: set[int] = set()
    for component, node in _nodes(plan):
        if node.target is not routed_feed_forward:
            continue
        width = weight_behind(component, node.args[5]).shape[2]
        if width not in seen:
            seen.add(width)
            yield Problem(_reading(width, bool(node.kwargs.get("permute"))))


def _reading(width: int, permutes: bool) -> str:
    if permutes:
        return (
            f"Experts {width:,} wide: rows are copied into their experts' order once, which costs "
            "little beside such wide products, and kernels read them in whole tiles."
        )
    return f"Experts {width:,} wide: kernels gather rows themselves, so nothing is copied."


def _nodes(plan: Plan) -> Iterator[tuple[Component, fx.Node]]:
    for component in plan.components:
        for program in component.programs.values():
            for node in program.graph.nodes:
                yield component, node
