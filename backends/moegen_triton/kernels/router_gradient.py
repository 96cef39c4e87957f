"""The backward pass of a router: gradients of its tokens, matrix and bias.

Products are kernels, since torch.mm would first copy all tokens, and what is multiplied with
them, to float32, and then multiply without tensor cores.
"""

import triton
import triton.language as tl
from torch import Tensor

from .device import narrow
from .exact import times_float32, times_to_16_bits

PROGRAMS = 256  # that keep a chip busy
PRECISION = "ieee"  # of products of float32


@triton.jit
def _by_scores(
    grad_weights,
    scores,
    weights,
    row,
    chosen,
    slot,
    inside,
    num_experts,
    eps,
    scale,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Gradients [T, k] of what the weights were made of: the chosen scores, or logits."""
    at = row[:, None] * K + slot[None, :]
    grad = tl.load(grad_weights + at, mask=inside, other=0) * scale
    if NORMALIZE == "sum":
        at = row[:, None] * num_experts + chosen
        score = tl.load(scores + at, mask=inside, other=0)
        total = tl.sum(score, 1)[:, None] + eps
        total = tl.where(inside, total, 1.0)  # rows beyond the last have no scores
        grad = (grad - tl.sum(grad * score, 1)[:, None] / total) / total
    elif NORMALIZE == "softmax_over_kept":
        share = tl.load(weights + at, mask=inside, other=0) / scale
        grad = share * (grad - tl.sum(grad * share, 1)[:, None])
    return grad


@triton.jit
def _spread(values, chosen, expert, slot, K: tl.constexpr):
    """values [T, k] at the chosen of all experts, 0 elsewhere -> [T, E]."""
    out = tl.zeros((values.shape[0], expert.shape[0]), tl.float32)
    for k in range(K):
        here = slot[None, :] == k
        index = tl.sum(tl.where(here, chosen, 0), 1)[:, None]
        value = tl.sum(tl.where(here, values, 0.0), 1)[:, None]
        out = tl.where(expert[None, :] == index, value, out)
    return out


@triton.jit
def _logits_gradient_kernel(
    grad_logits,
    grad_scores,
    grad_weights,
    scores,
    experts,
    weights,
    out,
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
    """The gradient of logits, of all that follows from them -> out [T, E]."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    row = token.to(tl.int64)
    inside = (token < num_tokens)[:, None] & (expert < num_experts)[None, :]
    at = row[:, None] * num_experts + expert[None, :]
    by_weights = tl.zeros((TOKENS, EXPERTS), tl.float32)
    if grad_weights is not None:
        slot = tl.arange(0, SLOTS)
        mine = (token < num_tokens)[:, None] & (slot < K)[None, :]
        chosen = tl.load(experts + row[:, None] * K + slot[None, :], mask=mine, other=0)
        # fmt: off
        values = _by_scores(
            grad_weights, scores, weights, row, chosen, slot, mine, num_experts, eps,
            scale, K, NORMALIZE,
        )
        # fmt: on
        by_weights = _spread(values, chosen.to(tl.int32), expert, slot, K)
    grad = tl.zeros((TOKENS, EXPERTS), tl.float32)
    if grad_scores is not None:
        grad += tl.load(grad_scores + at, mask=inside, other=0)
    if NORMALIZE != "softmax_over_kept":
        grad += by_weights
    if AFFINITY == "softmax":
        score = tl.load(scores + at, mask=inside, other=0)
        grad = score * (grad - tl.sum(grad * score, 1)[:, None])
    elif AFFINITY == "sigmoid":
        score = tl.load(scores + at, mask=inside, other=0)
        grad = grad * score * (1 - score)
    if NORMALIZE == "softmax_over_kept":
        grad += by_weights
    if grad_logits is not None:
        grad += tl.load(grad_logits + at, mask=inside, other=0)
    tl.store(out + at, grad, mask=inside)


@triton.jit
def _tokens_gradient_kernel(
    grad,
    router,
    out,
    num_tokens,
    num_experts,
    width,
    router_stride,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """grad [T, E] times router [E, d] -> out [T, d]."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row = token.to(tl.int64)[:, None]
    known, inside = (token < num_tokens)[:, None], (column < width)[None, :]
    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    for first in range(0, num_experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        here = expert < num_experts
        at = row * num_experts + expert[None, :]
        a = tl.load(grad + at, mask=known & here[None, :], other=0)
        at = expert.to(tl.int64)[:, None] * router_stride + column[None, :]
        b = tl.load(router + at, mask=here[:, None] & inside, other=0).to(tl.float32)
        if out.dtype.element_ty == tl.float32:
            total = times_float32(a, b, total, PRECISION)
        else:
            total = times_to_16_bits(a, b, total, PRECISION)
    found = narrow(total, out.dtype.element_ty)
    tl.store(out + row * width + column[None, :], found, mask=known & inside)


@triton.jit
def _router_gradient_kernel(
    grad,
    tokens,
    out,
    num_tokens,
    num_experts,
    width,
    share,
    token_stride,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """grad [T, E] transposed times tokens [T, d], over `share` tokens -> out [P, E, d]."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    start = tl.program_id(2) * share
    stop = tl.minimum(start + share, num_tokens)
    inside, known = column < width, expert < num_experts
    total = tl.zeros((WIDTH, EXPERTS), tl.float32)
    for first in range(start, stop, TOKENS):
        token = first + tl.arange(0, TOKENS)
        here, row = (token < stop)[:, None], token.to(tl.int64)[:, None]
        at = row * token_stride + column[None, :]
        x = tl.load(tokens + at, mask=here & inside[None, :], other=0)
        at = row * num_experts + expert[None, :]
        slope = tl.load(grad + at, mask=here & known[None, :], other=0)
        total = times_float32(tl.trans(x), slope, total, PRECISION)
    row = tl.program_id(2).to(tl.int64) * num_experts + expert
    at = row[None, :] * width + column[:, None]
    tl.store(out + at, total, mask=known[None, :] & inside[:, None])


def _of_logits(
    grads: tuple[Tensor | None, ...],
    scores: Tensor,
    experts: Tensor,
    weights: Tensor,
    num_experts: int,
    settings: tuple[str, str, float, float],
) -> Tensor:
    """The gradient of logits [T, E] by those of logits, scores and weights."""
    num_tokens, k = experts.shape
    affinity, normalize, eps, scale = settings
    out = weights.new_empty(num_tokens, num_experts)
    most = max(16, int(triton.next_power_of_2(num_experts)))
    block = max(1, 2048 // most)
    _logits_gradient_kernel[(triton.cdiv(num_tokens, block),)](
        *(None if grad is None else grad.contiguous() for grad in grads),
        scores,
        experts,
        weights,
        out,
        num_tokens,
        num_experts,
        eps,
        scale,
        K=k,
        SLOTS=max(2, triton.next_power_of_2(k)),
        AFFINITY=affinity,
        NORMALIZE=normalize,
        TOKENS=block,
        EXPERTS=most,
    )
    return out


def _of_tokens(grad: Tensor, router: Tensor, tokens: Tensor) -> Tensor:
    (num_tokens, num_experts), width = grad.shape, router.shape[1]
    router = router if router.stride(-1) == 1 else router.contiguous()
    out = tokens.new_empty(num_tokens, width)
    grid = (triton.cdiv(num_tokens, 64), triton.cdiv(width, 64))
    sizes = (num_tokens, num_experts, width, router.stride(0), PRECISION)
    blocks = {"TOKENS": 64, "WIDTH": 64, "EXPERTS": 16}
    # Without a limit the assembler spills a little, to fit one more program.
    _tokens_gradient_kernel[grid](grad, router, out, *sizes, **blocks, maxnreg=168)
    return out


def _of_router(grad: Tensor, router: Tensor, tokens: Tensor) -> Tensor:
    """Summed over parts of the tokens, as many as keep the chip busy, then over these."""
    (num_tokens, num_experts), width = grad.shape, router.shape[1]
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    block = min(128, max(16, int(triton.next_power_of_2(num_experts))))
    programs = triton.cdiv(width, 64) * triton.cdiv(num_experts, block)
    most = max(1, min(PROGRAMS // programs, num_tokens // 256))
    share = triton.cdiv(triton.cdiv(num_tokens, most), 32) * 32
    parts = triton.cdiv(num_tokens, share)
    out = grad.new_empty(parts, num_experts, width)
    grid = (triton.cdiv(width, 64), triton.cdiv(num_experts, block), parts)
    sizes = (num_tokens, num_experts, width, share, tokens.stride(0), PRECISION)
    blocks = {"WIDTH": 64, "EXPERTS": block, "TOKENS": 32}
    blocks["num_warps"] = 8 if block > 32 else 4
    _router_gradient_kernel[grid](grad, tokens, out, *sizes, **blocks)
    return (out[0] if parts == 1 else out.sum(0)).to(router.dtype)


def gradients(
    grad_logits: Tensor | None,
    grad_scores: Tensor | None,
    grad_weights: Tensor | None,
    tokens: Tensor,
    router: Tensor,
    bias: Tensor | None,
    scores: Tensor,
    experts: Tensor,
    weights: Tensor,
    affinity: str,
    normalize: str,
    eps: float,
    scale: float,
    wants_tokens: bool,
    wants_router: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, router and bias; what is not wanted is empty."""
    out = fake_gradients(
        *(grad_logits, grad_scores, grad_weights, tokens, router, bias, scores),
        *(experts, weights, affinity, normalize, eps, scale),
        *(wants_tokens, wants_router, wants_bias),
    )
    if tokens.shape[0] == 0:
        return out[0], out[1].zero_(), out[2].zero_()
    grads = (grad_logits, grad_scores, grad_weights)
    settings = (affinity, normalize, eps, scale)
    grad = _of_logits(grads, scores, experts, weights, router.shape[0], settings)
    return (
        _of_tokens(grad, router, tokens) if wants_tokens else out[0],
        _of_router(grad, router, tokens) if wants_router else out[1],
        grad.sum(0).to(out[2].dtype) if wants_bias else out[2],
    )


def fake_gradients(
    grad_logits: Tensor | None,
    grad_scores: Tensor | None,
    grad_weights: Tensor | None,
    tokens: Tensor,
    router: Tensor,
    bias: Tensor | None,
    scores: Tensor,
    experts: Tensor,
    weights: Tensor,
    affinity: str,
    normalize: str,
    eps: float,
    scale: float,
    wants_tokens: bool,
    wants_router: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty results of the right shapes and formats."""
    like = router if bias is None else bias
    return (
        tokens.new_empty(tokens.shape if wants_tokens else (0,)),
        router.new_empty(router.shape if wants_router else (0,)),
        like.new_empty(like.shape if wants_bias else (0,)),
    )
