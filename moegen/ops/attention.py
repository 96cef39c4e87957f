"""Attention in the forms that torch's own kernel lacks, and the cache that decoding writes.

Throughout: q [B, H, T, d]; k [B, G, S, d] and v [B, G, S, e] with G dividing H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.op import op


def seen_pairs(length: int, window: int | None = None) -> int:
    """Pairs (query, key) that a causal mask over `length` positions lets through."""
    if window is None:
        return length * (length + 1) // 2
    # The first min(window, length) queries see 1, 2, ... keys, the others `window`.
    short = min(window, length)
    return short * (short + 1) // 2 + (length - short) * window


def _core(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> int:
    """FLOPs of scores and mixing over so many pairs in each head of each sequence."""
    return 2 * q.shape[0] * q.shape[1] * pairs * (q.shape[-1] + v.shape[-1])


def _unfused(
    q: Tensor, k: Tensor, v: Tensor, weights: int, window: int | None = None
) -> int:
    """Bytes beside q that backward keeps where no kernel fuses attention, or q's blocks with them.

    Keys and values repeated for every head, so many copies of the attention weights, and the
    mask; a window makes blocks of its size, which see twice as many keys.
    """
    heads, keys, rows = q.shape[0] * q.shape[1], k.shape[2], q.shape[2]
    masks = 1
    blocks = 0
    if window is not None:
        rows, keys, masks = _blocks(q, window), 2 * window, q.shape[0]
        blocks = heads * rows * q.shape[-1]
    repeated = heads * (keys if window is None else 2 * rows)
    values = repeated * (q.shape[-1] + v.shape[-1]) + heads * rows * keys * weights
    return int((values + blocks) * q.dtype.itemsize + masks * rows * keys)


def _blocks(q: Tensor, window: int) -> int:
    """Rows of all blocks of one sequence, with the padding of the last."""
    return -(-q.shape[2] // window) * window


def _nothing(q: Tensor, window: int | None = None) -> int:
    """Bytes of the weights of attending to nothing, one a query."""
    rows = q.shape[2] if window is None else _blocks(q, window)
    return int(q.shape[0] * q.shape[1] * rows * q.dtype.itemsize)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> int:
    """Bytes that backward keeps of blocks: q, k and v twice, mask, result, and its statistics."""
    rows, groups = _blocks(q, window), k.shape[1]
    one = q.shape[1] * q.shape[-1] + groups * 2 * (k.shape[-1] + v.shape[-1])
    one += q.shape[1] * v.shape[-1] + 2 * window
    statistics = q.shape[1] * max(4, q.dtype.itemsize)
    return int(q.shape[0] * rows * (one * q.dtype.itemsize + statistics))


def _kept_queries(
    q: Tensor, k: Tensor, v: Tensor, *_: object, window: int | None = None
) -> tuple[str, ...]:
    """Queries are kept as they are, unless a window cuts them into blocks."""
    return ("q",) if window is None else ()


@op()
def at_most(length: int, most: int) -> int:
    """The smaller of two lengths."""
    return min(length, most)


@op()
def ring_positions(start: Tensor, size: int, device: torch.device) -> Tensor:
    """The position that each slot of a ring of `size` holds before `start`, negative if none."""
    slots = torch.arange(size, device=device)
    return start - 1 - (start - 1 - slots) % size


@op(effect=True)
def write_cache(cache: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Write values [B, H, T, d] to cache [B, H, L, d] at positions [T], in place; the cache."""
    return cache.index_copy_(2, positions, values.to(cache.dtype))


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Which keys a query sees, bool [S, S]: its own position and those before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, G, S, d] of grouped heads as [B, heads, S, d]."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def window_blocks(
    q: Tensor, k: Tensor, v: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut a sequence into n blocks, so that a window costs n blocks and not all pairs.

    Each block of queries sees its own block of keys and the one before. Gives q [B * n, H, w, d],
    k and v [B * n, G, 2w, ...] and the mask, bool [B * n, 1, w, 2w].
    """
    batch, _, length, _ = q.shape
    count = -(-length // window)

    def cut(x: Tensor) -> Tensor:
        # A whole window of padding, then cut: export notes whether a padding is empty.
        rest = x.new_zeros(x.shape[0], x.shape[1], window, x.shape[3])
        whole = torch.cat((x, rest), 2)[:, :, : count * window]
        return torch.unflatten(whole, 2, (count, window))

    def cut_with_previous(x: Tensor) -> Tensor:
        blocks = cut(x)
        first = x.new_zeros(x.shape[0], x.shape[1], 1, window, x.shape[3])
        previous = torch.cat((first, blocks), 2)[:, :, :-1]
        return torch.cat((previous, blocks), 3)

    def by_block(x: Tensor) -> Tensor:
        x = x.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return x.flatten(0, 1)

    query = torch.arange(window, device=q.device).unsqueeze(-1) + window
    key = torch.arange(2 * window, device=q.device)
    near = (key <= query) & (key > query - window)
    block = torch.arange(count, device=q.device).view(-1, 1, 1, 1)
    mask = (near & ((block > 0) | (key >= window))).repeat(batch, 1, 1, 1)
    keys, values = cut_with_previous(k), cut_with_previous(v)
    return by_block(cut(q)), by_block(keys), by_block(values), mask


def join_blocks(out: Tensor, batch: int, length: int) -> Tensor:
    """The inverse of window_blocks: out [B * n, H, w, e] to [B, H, S, e]."""
    count = -(-length // out.shape[2])
    blocks = torch.unflatten(out, 0, (batch, count)).transpose(1, 2)
    # A block more than needed, so that what is cut off is never empty, as above.
    more = out.new_zeros(batch, out.shape[1], 1, out.shape[2], out.shape[3])
    return torch.cat((blocks, more), 2).flatten(2, 3)[:, :, :length]


@op(
    flops=lambda q, k, v, window, scale: _core(q, k, v, seen_pairs(q.shape[2], window)),
    backward=2.5,
    extra=lambda q, k, v, window, scale: _windowed(q, k, v, window),
)
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float
) -> Tensor:
    """Causal attention to the nearest `window` positions, a query's own included."""
    blocks = window_blocks(q, k, v, window)
    out = F.scaled_dot_product_attention(
        *blocks[:3], attn_mask=blocks[3], scale=scale, enable_gqa=True
    )
    return join_blocks(out, q.shape[0], q.shape[2])


def _chunked(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> int:
    """Bytes that backward keeps of chunks: q, k, v, result, and its statistics."""
    rows, groups = _blocks(q, chunk), k.shape[1]
    one = (q.shape[1] + groups) * (q.shape[-1] + v.shape[-1])
    statistics = q.shape[1] * max(4, q.dtype.itemsize)
    return int(q.shape[0] * rows * (one * q.dtype.itemsize + statistics))


def chunk_pairs(length: int, chunk: int) -> int:
    """Pairs (query, key) of one chunk that a causal mask over `length` positions lets through."""
    whole, rest = divmod(length, chunk)
    return whole * seen_pairs(chunk) + seen_pairs(rest)


@op(
    flops=lambda q, k, v, chunk, scale: _core(q, k, v, chunk_pairs(q.shape[2], chunk)),
    backward=2.5,
    extra=lambda q, k, v, chunk, scale: _chunked(q, k, v, chunk),
)
def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk: int, scale: float
) -> Tensor:
    """Causal attention to the positions of a query's own chunk (Llama 4, 2025)."""
    query, key, value = (chunks_of(x, chunk) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )
    return join_blocks(out, q.shape[0], q.shape[2])


def chunks_of(x: Tensor, chunk: int) -> Tensor:
    """x [B, H, S, d] cut into n chunks, the last one padded: [B * n, H, chunk, d]."""
    count = -(-x.shape[2] // chunk)
    rest = x.new_zeros(x.shape[0], x.shape[1], chunk, x.shape[3])
    whole = torch.cat((x, rest), 2)[:, :, : count * chunk]
    blocks = torch.unflatten(whole, 2, (count, chunk)).transpose(1, 2)
    return blocks.clone(memory_format=torch.contiguous_format).flatten(0, 1)


@op(saves=(), extra=lambda q, *_: 4 * q.shape[2])  # the factors
def scale_queries(q: Tensor, positions: Tensor, scale: float, floor: float) -> Tensor:
    """q [B, H, T, d] times 1 + scale ln(1 + floor((position + 1) / floor)) (Llama 4).

    Source: Nakanishi 2025 (arXiv:2501.19399), whose scale keeps attention sharp at long range.
    """
    factor = 1 + scale * torch.log1p(((positions.float() + 1) / floor).floor())
    return (q * factor.unsqueeze(-1)).to(q.dtype)


@op(
    flops=lambda q, k, v, mask, *_: _core(q, k, v, q.shape[2] * k.shape[2]),
    saves=("q",),
    extra=lambda q, k, v, *_: _unfused(q, k, v, 1) + _nothing(q),
)
def masked_sink_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor, scale: float
) -> Tensor:
    """Attention whose heads may attend to nothing, with logit sinks [H], under a mask.

    mask is bool, broadcast to [B, H, T, S]. Source: gpt-oss (2025); the idea is Xiao et al. 2023.
    """
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    nothing = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, nothing), -1).softmax(-1)[..., :-1] @ v


@op(
    flops=lambda q, k, v, *_, window=None: _core(
        q, k, v, seen_pairs(q.shape[2], window)
    ),
    saves=_kept_queries,
    extra=lambda q, k, v, *_, window=None: (
        _unfused(q, k, v, 1, window) + _nothing(q, window)
    ),
)
def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention whose heads may attend to nothing, with logit sinks [H]."""
    if window is None:
        mask = causal_mask(q.shape[2], q.device)
        return masked_sink_attention(q, k, v, mask, sinks, scale)
    out = masked_sink_attention(*window_blocks(q, k, v, window), sinks, scale)
    return join_blocks(out, q.shape[0], q.shape[2])


@op(
    flops=lambda q, k, v, mask, *_: _core(q, k, v, q.shape[2] * k.shape[2]),
    saves=("q",),
    extra=lambda q, k, v, *_: _unfused(q, k, v, 2),
)
def masked_capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cap: float, scale: float
) -> Tensor:
    """Attention with bounded logits, cap * tanh(score / cap), under a mask.

    mask is bool, broadcast to [B, H, T, S]. Source: Gemma 2, Grok-1 (2024).
    """
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = cap * torch.tanh(q @ k.transpose(-1, -2) * (scale / cap))
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


@op(
    flops=lambda q, k, v, *_, window=None: _core(
        q, k, v, seen_pairs(q.shape[2], window)
    ),
    saves=_kept_queries,
    extra=lambda q, k, v, *_, window=None: _unfused(q, k, v, 2, window),
)
def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, cap: float, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention with bounded logits, cap * tanh(score / cap)."""
    if window is None:
        return masked_capped_attention(
            q, k, v, causal_mask(q.shape[2], q.device), cap, scale
        )
    out = masked_capped_attention(*window_blocks(q, k, v, window), cap, scale)
    return join_blocks(out, q.shape[0], q.shape[2])
