"""The kernels of routers: the product, the scores, the choice and its weights, all in float32."""

import triton
import triton.language as tl

from .exact import times_float32

# Below all logits but minus infinity, which less itself would be NaN.
LEAST = tl.constexpr(-3.4e38)


@triton.jit
def _logits(
    tokens,
    router,
    token,
    expert,
    first,
    last,
    num_tokens,
    num_experts,
    token_stride,
    router_stride,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Products of tokens and experts over the columns from first to last."""
    total = tl.zeros((token.shape[0], expert.shape[0]), tl.float32)
    x_row = tokens + token.to(tl.int64)[:, None] * token_stride
    w_row = router + expert.to(tl.int64)[:, None] * router_stride
    for start in range(first, last, WIDTH):
        column = (start + tl.arange(0, WIDTH))[None, :]
        here = column < last
        x = tl.load(x_row + column, mask=(token < num_tokens)[:, None] & here, other=0)
        w = tl.load(
            w_row + column, mask=(expert < num_experts)[:, None] & here, other=0
        )
        total = times_float32(x, tl.trans(w.to(tl.float32)), total, PRECISION)
    return total


@triton.jit
def _scores(logits, expert, num_experts, AFFINITY: tl.constexpr):
    if AFFINITY == "softmax":
        known = expert[None, :] < num_experts
        seen = tl.where(known, logits, LEAST)
        power = tl.where(known, tl.exp(seen - tl.max(seen, 1)[:, None]), 0.0)
        scores = power / tl.sum(power, 1)[:, None]
    elif AFFINITY == "sigmoid":
        scores = tl.sigmoid(logits)
    else:
        tl.static_assert(AFFINITY == "none")
        scores = logits
    return scores


@triton.jit
def _ranks(ranked, expert, num_experts):
    """Integers in the order of the scores; the least of all for what is no expert."""
    bits = ranked.to(tl.int32, bitcast=True)
    # Negative floats grow downwards in their bits, and -0.0 is 0.0.
    rank = tl.where(ranked == 0, 0, ((bits >> 31) & 0x7FFFFFFF) ^ bits)
    rank = tl.maximum(rank, -0x7FFFFFFF)
    return tl.where(expert[None, :] < num_experts, rank, -0x80000000)


@triton.jit
def _choose(rank, source, expert, slot, K: tl.constexpr):
    """The K best, best first, the lowest of equals, and what source holds of them."""
    chosen = tl.zeros((rank.shape[0], slot.shape[0]), tl.int32)
    values = tl.zeros((rank.shape[0], slot.shape[0]), tl.float32)
    for k in range(K):
        best = rank == tl.max(rank, 1)[:, None]
        first = tl.min(tl.where(best, expert[None, :], rank.shape[1]), 1)[:, None]
        this = expert[None, :] == first
        value = tl.sum(tl.where(this, source, 0.0), 1)[:, None]
        rank = tl.where(this, -0x80000000, rank)
        chosen = tl.where(slot[None, :] == k, first, chosen)
        values = tl.where(slot[None, :] == k, value, values)
    return chosen, values


@triton.jit
def _decide(
    logits,
    bias,
    balance_bias,
    out,
    token,
    expert,
    num_tokens,
    num_experts,
    eps,
    scale,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    AFFINITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """From logits without bias to all that is written: out holds the four addresses."""
    known = expert < num_experts
    inside = (token < num_tokens)[:, None] & known[None, :]
    at = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    if bias is not None:
        logits += tl.load(bias + expert, mask=known, other=0).to(tl.float32)[None, :]
    if out[0] is not None:
        tl.store(out[0] + at, logits, mask=inside)
    scores = _scores(logits, expert, num_experts, AFFINITY)
    if out[1] is not None:
        tl.store(out[1] + at, scores, mask=inside)
    ranked = scores
    if balance_bias is not None:
        ranked += tl.load(balance_bias + expert, mask=known, other=0)[None, :]
    rank = _ranks(ranked, expert, num_experts)
    slot = tl.arange(0, SLOTS)
    source = logits if NORMALIZE == "softmax_over_kept" else scores
    chosen, weights = _choose(rank, source, expert, slot, K)
    if NORMALIZE == "sum":
        weights = weights / (tl.sum(weights, 1) + eps)[:, None]
    elif NORMALIZE == "softmax_over_kept":
        taken = slot[None, :] < K
        seen = tl.where(taken, weights, LEAST)
        power = tl.where(taken, tl.exp(seen - tl.max(seen, 1)[:, None]), 0.0)
        weights = power / tl.sum(power, 1)[:, None]
    at = token.to(tl.int64)[:, None] * K + slot[None, :]
    inside = (token < num_tokens)[:, None] & (slot < K)[None, :]
    tl.store(out[2] + at, chosen.to(tl.int64), mask=inside)
    tl.store(out[3] + at, weights * scale, mask=inside)


@triton.jit
def route_kernel(
    tokens,
    router,
    bias,
    balance_bias,
    logits,
    scores,
    experts,
    weights,
    num_tokens,
    num_experts,
    width,
    token_stride,
    router_stride,
    eps,
    scale,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    AFFINITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each program routes TOKENS tokens, from the product on."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    # fmt: off
    found = _logits(
        tokens, router, token, expert, 0, width, num_tokens, num_experts,
        token_stride, router_stride, PRECISION, WIDTH,
    )
    _decide(
        found, bias, balance_bias, (logits, scores, experts, weights), token, expert,
        num_tokens, num_experts, eps, scale, K, SLOTS, AFFINITY, NORMALIZE,
    )
    # fmt: on


@triton.jit
def product_kernel(
    tokens,
    router,
    parts,
    num_tokens,
    num_experts,
    width,
    share,
    token_stride,
    router_stride,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each program multiplies a block over `share` columns -> parts [P, T, E]."""
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, width)
    # fmt: off
    found = _logits(
        tokens, router, token, expert, first, last, num_tokens, num_experts,
        token_stride, router_stride, PRECISION, WIDTH,
    )
    # fmt: on
    row = tl.program_id(2).to(tl.int64) * num_tokens + token
    inside = (token < num_tokens)[:, None] & (expert < num_experts)[None, :]
    tl.store(parts + row[:, None] * num_experts + expert[None, :], found, mask=inside)


@triton.jit
def decide_kernel(
    parts,
    bias,
    balance_bias,
    logits,
    scores,
    experts,
    weights,
    num_parts,
    num_tokens,
    num_experts,
    eps,
    scale,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    AFFINITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Each program sums the parts of TOKENS tokens in order, and chooses."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    found = tl.zeros((TOKENS, EXPERTS), tl.float32)
    inside = (token < num_tokens)[:, None] & (expert < num_experts)[None, :]
    row = token.to(tl.int64)
    for _ in range(num_parts):
        at = row[:, None] * num_experts + expert[None, :]
        found += tl.load(parts + at, mask=inside, other=0)
        row += num_tokens
    # fmt: off
    _decide(
        found, bias, balance_bias, (logits, scores, experts, weights), token, expert,
        num_tokens, num_experts, eps, scale, K, SLOTS, AFFINITY, NORMALIZE,
    )
    # fmt: on
