"""Where routers stand: over all tokens, over tokens with ids, over the rows of each expert."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F

from moegen.arch.init import ZEROS
from moegen.arch.routing.routed import Linear
from moegen.graph.builder import Builder
from moegen.ops.experts import grouped_bias, grouped_linear


def one_matrix(b: Builder, x: Any, name: str, n: int, bias: bool = False) -> Any:
    """x [T, d] times one matrix for all tokens."""
    dtype, width = b.spec.precision.router_dtype, b.width
    weight = b.param(name, n, width, dtype=dtype, role="router")
    added = None
    if bias:
        added = b.param(f"{name}_bias", n, dtype=dtype, init=ZEROS, role="router")
    return F.linear(_as_router(b, x), weight, added)


def matrix_of_id(ids: Any, count: int) -> Linear:
    """x [T, d] times the matrix of each token's id, ids [T] below count."""

    def linear(b: Builder, x: Any, name: str, n: int, bias: bool = False) -> Any:
        dtype, width = b.spec.precision.router_dtype, b.width
        weight = b.param(name, count, n, width, dtype=dtype, role="router")
        every = F.linear(_as_router(b, x), weight.flatten(0, 1))
        own = torch.unflatten(every, -1, (count, n)).gather(1, ids.view(-1, 1, 1).expand(-1, 1, n))
        own = own.squeeze(1)
        if bias:
            facts: dict[str, Any] = {"dtype": dtype, "init": ZEROS, "role": "router"}
            own = own + F.embedding(ids, b.param(f"{name}_bias", count, n, **facts))
        return own

    return linear


def matrix_of_expert(ends: Any, experts: int, active: Fraction) -> Linear:
    """x [N, d] times the matrix of each row's expert, whose rows end at ends [E].

    active: the fraction of the experts that a token meets.
    """

    def linear(b: Builder, x: Any, name: str, n: int, bias: bool = False) -> Any:
        dtype, width = b.spec.precision.router_dtype, b.width
        name = f"inner_{name}"
        facts: dict[str, Any] = {"dtype": dtype, "role": "router", "active": active}
        weight = b.param(name, experts, n, width, **facts)
        if not bias:
            return grouped_linear(_as_router(b, x), weight, ends)
        added = b.param(f"{name}_bias", experts, n, init=ZEROS, **facts)
        return grouped_bias(grouped_linear(_as_router(b, x), weight, ends), added, ends)

    return linear


def _as_router(b: Builder, x: Any) -> Any:
    dtype = b.spec.precision.router_dtype
    return x if dtype == b.spec.precision.compute_dtype else x.to(dtype)
