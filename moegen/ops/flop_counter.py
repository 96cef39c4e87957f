"""FLOP formulas that torch.utils.flop_counter lacks: grouped products and CPU attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import moegen.ops.experts  # noqa: F401  (defines the ops counted here)

Shape = Sequence[int]


def custom_mapping(*, halve_causal: bool = True) -> dict[Any, Callable[..., int]]:
    """Formulas for FlopCounterMode(custom_mapping=...), forward and backward.

    halve_causal: count only the pairs that a causal mask lets through, S(S+1)/2 for S queries
    and keys, where torch's own formulas for other devices count them all.
    """
    aten, own = torch.ops.aten, torch.ops.moegen
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return {
        aten._grouped_mm: _grouped_mm,
        own.grouped_linear: _grouped_linear,
        own.grouped_outer: _grouped_outer,
        own.gather_rows: _nothing,
        own.sum_rows: _nothing,
        forward: _attention(halve_causal),
        backward: _attention_backward(halve_causal),
    }


def _grouped_mm(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    """Every row of one side meets one matrix of the other, whichever side is grouped."""
    if len(left) == 3 and len(right) == 3:
        return 2 * left[0] * left[1] * left[2] * right[2]
    return 2 * left[-2] * left[-1] * right[-1]


def _grouped_linear(rows: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


def _grouped_outer(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _nothing(*args: Any, **kwargs: Any) -> int:
    """Gathering rows and summing them back are traffic: only products of matrices count."""
    return 0


def _pairs(queries: int, keys: int, causal: bool) -> int:
    """How many (query, key) pairs there are; query i of a causal mask sees keys 0 to i."""
    if not causal:
        return queries * keys
    seen = min(queries, keys)
    return seen * (seen + 1) // 2 + (queries - seen) * keys


def _attention(halve_causal: bool) -> Callable[..., int]:
    def count(
        query: Shape,
        key: Shape,
        value: Shape,
        dropout: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> int:
        batch, heads, queries, width = query
        pairs = _pairs(queries, key[-2], halve_causal and is_causal)
        return 2 * batch * heads * pairs * (width + value[-1])

    return count


def _attention_backward(halve_causal: bool) -> Callable[..., int]:
    """Five products: the scores again, then the gradients of v, scores, q and k."""

    def count(
        grad: Shape,
        query: Shape,
        key: Shape,
        value: Shape,
        out: Shape,
        logsumexp: Shape,
        dropout: float,
        is_causal: bool,
        **kwargs: Any,
    ) -> int:
        batch, heads, queries, width = query
        pairs = _pairs(queries, key[-2], halve_causal and is_causal)
        return 2 * batch * heads * pairs * (3 * width + 2 * value[-1])

    return count
