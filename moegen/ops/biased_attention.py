"""Attention whose logits have a bias for each pair: relative positions, and what padding hides.

Throughout: q [B, H, T, d]; k [B, G, S, d] and v [B, G, S, e] with G dividing H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moegen.ops.attention import causal_mask, repeat_heads, seen_pairs
from moegen.ops.op import op


def lowest(dtype: torch.dtype) -> float:
    """A logit that takes no part in a softmax, and that stays finite if some are added to it."""
    return torch.finfo(dtype).min / 2


@op()
def padding_bias(ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What keeps attention off the padding of ids [B, S]: 0 at real tokens, [B, 1, 1, S].

    mask [B, S] tells real tokens; without one all of them are.
    """
    bias = torch.zeros(ids.shape, dtype=dtype, device=ids.device)
    if mask is not None:
        bias = bias.masked_fill(~mask.bool(), lowest(dtype))
    return bias.view(ids.shape[0], 1, 1, ids.shape[1])


@op()
def relative_buckets(
    queries: Tensor, keys: Tensor, bidirectional: bool, buckets: int, longest: int
) -> Tensor:
    """Buckets [T, S] of the distances from positions [T] to positions [S] (T5, 2020).

    The first half of the buckets are for distances one by one, the others for ranges that grow
    by powers up to `longest`; all beyond share the last one. Where attention goes both ways,
    later positions have half of all buckets; else they are of no distance.
    """
    distance = queries.unsqueeze(-1) - keys
    later = torch.zeros_like(distance)
    if bidirectional:
        buckets = buckets // 2
        later = (distance < 0).to(torch.int64) * buckets
        distance = distance.abs()
    else:
        distance = distance.clamp(min=0)
    single = buckets // 2
    # The order of these products decides on which side of a border a distance falls.
    power = torch.log(distance.clamp(min=1).float() / single) / math.log(
        longest / single
    )
    wide = single + (power * (buckets - single)).to(torch.int64)
    near = distance < single
    return later + torch.where(near, distance, wide.clamp(max=buckets - 1))


@op()
def sinusoidal_positions(
    positions: Tensor, width: int, longest: float, dtype: torch.dtype
) -> Tensor:
    """Vectors [S, width] of positions [S]: sines, then cosines, of width // 2 wavelengths.

    From 2 pi to 2 pi * longest in equal ratios (Vaswani et al. 2017, as in fairseq).
    """
    half = width // 2
    step = math.log(longest) / max(half - 1, 1)
    places = torch.arange(half, dtype=torch.int64, device=positions.device)
    angles = positions.float().unsqueeze(-1) * torch.exp(places.float() * -step)
    return torch.cat((angles.sin(), angles.cos()), -1).to(dtype)


def _pairs(q: Tensor, k: Tensor, causal: bool) -> int:
    """Pairs of a query and a key that may meet."""
    return seen_pairs(q.shape[2]) if causal else q.shape[2] * k.shape[2]


def _flops(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, causal: bool = False
) -> int:
    width = q.shape[-1] + v.shape[-1]
    return int(2 * q.shape[0] * q.shape[1] * _pairs(q, k, causal) * width)


def _kept(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, causal: bool = False
) -> int:
    """Bytes of queries, and of keys and values for each head, side by side, and of the weights."""
    heads = q.shape[0] * q.shape[1]
    rows = q.shape[2] * q.shape[-1] + k.shape[2] * (k.shape[-1] + v.shape[-1])
    weights = q.shape[2] * k.shape[2]
    mask = q.shape[2] * k.shape[2] if causal else 0
    return int(heads * (rows + weights) * q.dtype.itemsize + mask)


@op(flops=_flops, extra=_kept)
def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    causal: bool = False,
) -> Tensor:
    """Attention with logits scale * q . k + bias, causal if asked.

    bias is broadcast to [B, H, T, S] and may need a gradient.
    """
    if k.shape[1] != q.shape[1]:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = q @ k.transpose(-1, -2)
    scores = (scores if scale == 1.0 else scores * scale) + bias
    if causal:
        mask = causal_mask(q.shape[2], q.device)
        scores = scores.masked_fill(~mask, lowest(scores.dtype))
    return scores.softmax(-1) @ v


@op()
def later_bias(positions: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """What keeps queries at positions [T] off later ones of keys [L]: 0 at the others, [T, L]."""
    later = keys > positions.unsqueeze(-1)
    return torch.zeros(later.shape, dtype=dtype, device=keys.device).masked_fill(
        later, lowest(dtype)
    )
