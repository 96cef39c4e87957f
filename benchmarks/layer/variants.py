"""What is measured: moegen's own variants, and the dense products that bound them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.layer.inputs import Batch, Inputs, route
from benchmarks.layer.shapes import Workload

# Of a batch: the layer's output [T, d]. Chooses by batch.experts and batch.weights.
Forward = Callable[[Batch], Tensor]
Family = Literal["ours", "ours, Triton", "Triton", "torch", "transformers", "CuTe", "dense"]


class Absent(Exception):
    """The variant cannot run here; says why."""


@dataclass(frozen=True)
class Variant:
    """A way to compute the layer.

    `make` gives the pass for a workload's inputs, or raises Absent. `refuses` says why a workload
    is not for it, if so. `routes` is how it chooses experts when that is measured too.
    """

    name: str
    family: Family
    make: Callable[[Workload, Inputs], Forward]
    refuses: Callable[[Workload], str] = lambda work: ""
    routes: Callable[[Tensor, int, torch.dtype], tuple[Tensor, Tensor]] = route
    compiled: bool = False
    # Whether it waits for nothing, so that a CUDA graph can hold it. What waits must not be tried:
    # a capture that failed leaves torch's allocator unable to free.
    captures: bool = True


def module(name: str) -> Any:
    """An optional package; Absent with the import's own message if it cannot be imported."""
    try:
        return import_module(name)
    except Exception as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise Absent(f"import {name}: {reason}") from problem


def our_route(logits: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same choice by our op, whose ties go to the lowest expert."""
    scores = logits.float().softmax(-1)
    experts = module("moegen.ops.routing").top_k(scores, k)
    best = scores.gather(-1, experts)
    return experts, (best / best.sum(-1, keepdim=True)).to(dtype)


def _eager(work: Workload, inputs: Inputs, **options: Any) -> Forward:
    routing = module("moegen.ops.routing")
    fused = module("moegen.ops.feed_forward").routed_feed_forward
    swiglu = module("moegen.ops.activations").swiglu

    def forward(batch: Batch) -> Tensor:
        order, ends = routing.sort_by_expert(batch.experts, work.experts)
        out: Tensor = fused(
            *(batch.x, order, batch.weights, ends, inputs.up, inputs.down),
            activation=swiglu,
            **options,
        )
        return out

    return forward


def _triton(work: Workload, inputs: Inputs, **options: Any) -> Forward:
    dispatch = module("moegen_triton.kernels.dispatch")
    fused = module("moegen_triton.kernels.feed_forward").routed_feed_forward
    swiglu = module("moegen.ops.activations").swiglu

    def forward(batch: Batch) -> Tensor:
        order, ends = dispatch.sort_by_expert(batch.experts, work.experts)
        out: Tensor = fused(
            *(batch.x, order, batch.weights, ends, inputs.up, inputs.down),
            activation=swiglu,
            **options,
        )
        return out

    return forward


def compiled(variant: Variant, *, backend: str | None = None, only_bf16: bool = False) -> Variant:
    """The variant under torch.compile; the first call compiles."""

    def refuses(work: Workload) -> str:
        if only_bf16 and work.dtype != "bf16":
            return "torch.compile takes its operator in bf16 alone"
        return variant.refuses(work)

    def make(work: Workload, inputs: Inputs) -> Forward:
        made = variant.make(work, inputs)
        if backend is not None:
            return torch.compile(made, backend=backend)
        if inputs.up.is_cuda:
            return torch.compile(made, dynamic=False, mode="max-autotune-no-cudagraphs")
        return torch.compile(made, dynamic=False)

    how = "torch.compile" if backend is None else f"torch.compile, {backend}"
    name = f"{variant.name} + {how}"
    return replace(variant, name=name, make=make, refuses=refuses, compiled=True)


def _with(make: Callable[..., Forward], **options: Any) -> Callable[[Workload, Inputs], Forward]:
    return lambda work, inputs: make(work, inputs, **options)


EAGER = Variant("moegen eager", "ours", _eager, routes=our_route)
OURS = (
    EAGER,
    Variant("moegen eager, recompute", "ours", _with(_eager, recompute=True), routes=our_route),
    Variant("moegen Triton", "ours, Triton", _triton, routes=our_route),
    Variant(
        "moegen Triton, permuted", "ours, Triton", _with(_triton, permute=True), routes=our_route
    ),
    Variant(
        "moegen Triton, recompute", "ours, Triton", _with(_triton, recompute=True), routes=our_route
    ),
)
DENSE = "dense products (ceiling)"


def dense_steps(work: Workload, device: torch.device) -> dict[str, Callable[[int], object]]:
    """Plain products with the FLOPs of a forward and of a whole pass: one expert has all rows."""
    rows, d, n, dtype = work.rows, work.d, work.n, work.torch_dtype

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, up, down, hidden = numbers(rows, d), numbers(2 * n, d), numbers(d, n), numbers(rows, n)
    first, out = numbers(rows, 2 * n), numbers(rows, d)
    d_up, d_down = torch.empty_like(up), torch.empty_like(down)

    def forward(_: int) -> None:
        torch.mm(x, up.t(), out=first)
        torch.mm(hidden, down.t(), out=out)

    def both(i: int) -> None:
        forward(i)
        torch.mm(out, down, out=hidden)
        torch.mm(out.t(), hidden, out=d_down)
        torch.mm(first.t(), x, out=d_up)
        torch.mm(first, up, out=out)

    return {"inference": forward, "forward": forward, "both": both}
