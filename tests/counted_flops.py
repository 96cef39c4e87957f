"""FLOPs of emitted models as torch counts them, and how these differ from a plan's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tiny_models import BATCH, LENGTH, token_ids
from torch.utils.flop_counter import FlopCounterMode

from moegen.arch.attention import Attention, GroupedQueryAttention
from moegen.arch.latent_attention import LatentAttention
from moegen.ops.attention import chunk_pairs, seen_pairs
from moegen.ops.flop_counter import custom_mapping
from moegen.passes.cost import Summary
from moegen.planner import Plan


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=custom_mapping())


def forward_and_backward(model: Any) -> tuple[int, int]:
    """What torch counts in a forward and a backward pass from the logits."""
    with counter() as forward:
        out = model(token_ids())
    with counter() as backward:
        out.logits.float().square().mean().backward()
    return int(forward.get_total_flops()), int(backward.get_total_flops())


def declared(summary: Summary) -> tuple[int, int]:
    return sum(summary.flops.values()), sum(summary.backward.values())


def expected(plan: Plan) -> tuple[int, int]:
    """What torch should count for a plan's forward and backward pass."""
    forward, backward = declared(plan.costs["forward"])
    more, more_backward = (sum(column) for column in zip(*beyond_the_mask(plan), strict=True))
    return forward + more, backward + more_backward


def beyond_the_mask(plan: Plan) -> Iterator[tuple[int, int]]:
    """What torch counts, per layer, beyond the pairs inside the mask: forward and backward.

    The counter sees the shapes of products only, so it counts masked pairs wherever the mask is
    a tensor, or where CPU attention with values narrower than keys takes the unfused path.
    A plan counts pairs inside the mask, which is what a fused kernel computes.
    """
    model = plan.spec.model
    yield 0, 0
    for layer in range(model.layers):
        attention = model.attention.in_layer(layer, model.layers)
        keys, values = widths(attention, model.d_model)
        per_pair = 2 * BATCH * attention.heads * (keys + values)
        window = attention.window.size if attention.window else None
        chunked = window and attention.window.chunked
        seen = chunk_pairs(LENGTH, window) if chunked else seen_pairs(LENGTH, window)
        five = 2 * BATCH * attention.heads * (3 * keys + 2 * values)
        if fused(attention):
            pairs = blocks(window, chunked) if window else seen
            yield per_pair * (pairs - seen), five * (pairs - seen)
            continue
        # Products one by one keep the scores, so that backward has four products, not five.
        pairs = blocks(window) if window else LENGTH**2
        unfused = getattr(attention, "sinks", False) or getattr(attention, "softcap", None)
        backward = per_pair * 2 * seen if unfused else five * seen
        yield per_pair * (pairs - seen), per_pair * 2 * pairs - backward


def widths(attention: Attention, d_model: int) -> tuple[int, int]:
    if isinstance(attention, LatentAttention):
        return attention.nope_dim + attention.rope_dim, attention.value_dim
    return (attention.rope_width(d_model),) * 2


def fused(attention: Attention) -> bool:
    """Whether torch's CPU kernel computes it as one op."""
    if isinstance(attention, LatentAttention):
        return attention.nope_dim + attention.rope_dim == attention.value_dim
    assert isinstance(attention, GroupedQueryAttention)
    return not attention.sinks and not attention.softcap


def blocks(window: int, chunked: bool = False) -> int:
    """Pairs in the blocks that a window is cut into, masked ones or those of padding included."""
    one = seen_pairs(window) if chunked else window * 2 * window
    return -(-LENGTH // window) * one
