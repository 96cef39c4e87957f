"""The sizes of a plan's routed layers, which kernels are tuned for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moegen.graph import meta
from moegen.ops.feed_forward import routed_feed_forward
from moegen.planner import Plan

if TYPE_CHECKING:
    from moegen_triton.launches import Layer


def tune_package(plan: Plan, folder: Path, tokens: Sequence[int], progress: Any) -> str:
    """Measure the kernels' tiles for a package's layers, and write them beside its kernels."""
    from moegen_triton.tune import tune

    layers = list(layers_of(plan, tokens))
    if not layers:
        return f"no layer of {folder} has routed experts in one op, so there is nothing to tune"
    out = folder / "kernels" / "tiles.json"
    found = tune(layers, out, progress)
    return f"wrote {out}: {len(found.rows)} tiles for {found.device}"


def layers_of(plan: Plan, tokens: Sequence[int]) -> Iterator[Layer]:
    """Each distinct routed layer with each number of tokens."""
    from moegen_triton.launches import Layer

    seen: set[Layer] = set()
    for component in plan.components:
        graph = component.programs["forward"].graph
        for node in graph.nodes:
            if node.target is not routed_feed_forward:
                continue
            weights, down = meta.val(node.args[2]), meta.val(node.args[5])
            experts, d, n = down.shape
            activation = node.kwargs["activation"].__name__
            for count in tokens:
                layer = Layer(count, weights.shape[1], experts, d, n, down.dtype, activation)
                if layer not in seen:
                    seen.add(layer)
                    yield layer
