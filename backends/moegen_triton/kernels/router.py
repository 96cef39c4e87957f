"""A router in one kernel: logits, scores, the choice of experts and their weights.

All of it is float32, whatever the format of the tokens. For few tokens, or more experts than one
program can hold, the product is spread over the chip and a second kernel does the rest.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .device import capability, check_formats
from .library import define
from .router_gradient import fake_gradients, gradients
from .router_kernels import decide_kernel, product_kernel, route_kernel

# Experts up to which one program chooses among what it has computed; more would spill.
TOGETHER = 128
PROGRAMS = 128  # that keep a chip busy
PRECISION = "ieee"  # of float32 tokens


class Blocks(NamedTuple):
    """Blocks of the product, and in how many parts it is summed; 0: all in one kernel."""

    tokens: int
    experts: int
    width: int
    warps: int
    parts: int


def _blocks(num_tokens: int, num_experts: int, x: Tensor) -> Blocks:
    """Blocks for tokens x: few of them are spread over experts and parts of the width.

    Chosen such that nothing spills: float32 is multiplied without tensor cores, in registers.
    """
    most = max(16, int(triton.next_power_of_2(num_experts)))
    many = num_tokens >= 64 * PROGRAMS // 2
    if most <= TOGETHER and many:
        return Blocks(64, most, 32, 8 if most > 64 else 4, 0)
    wide = x.dtype == torch.bfloat16 and capability(x.device) < (12, 0)
    tokens = 16 if num_tokens <= 16 else 64
    experts = 128 if many and wide else min(most, 32)
    programs = triton.cdiv(num_tokens, tokens) * triton.cdiv(num_experts, experts)
    parts = max(1, min(PROGRAMS // programs, x.shape[1] // 64))
    columns = 16 if x.dtype == torch.float32 else 32
    return Blocks(tokens, experts, columns, 8 if experts == 128 else 4, parts)


def _route(
    tokens: Tensor,
    router: Tensor,
    bias: Tensor | None,
    balance_bias: Tensor | None,
    k: int,
    affinity: str,
    normalize: str,
    eps: float,
    scale: float,
    wants_logits: bool,
    wants_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_formats(tokens, router, bias)
    settings = (k, affinity, normalize, eps, scale, wants_logits, wants_scores)
    out = _route_fake(tokens, router, bias, balance_bias, *settings)
    if tokens.shape[0] == 0:
        return out
    tokens, router = _dense(tokens), _dense(router)
    biases = (
        None if bias is None else bias.contiguous(),
        None if balance_bias is None else balance_bias.float().contiguous(),
    )
    written = (*(x if x.numel() else None for x in out[:2]), *out[2:])
    choice = {
        "K": k,
        "SLOTS": max(2, triton.next_power_of_2(k)),
        "AFFINITY": affinity,
        "NORMALIZE": normalize,
    }
    blocks = _blocks(tokens.shape[0], router.shape[0], tokens)
    launch = _spread if blocks.parts else _together
    launch(tokens, router, (*biases, *written), (eps, scale), choice, blocks)
    return out


def _together(
    tokens: Tensor,
    router: Tensor,
    addresses: tuple[Tensor | None, ...],
    numbers: tuple[float, float],
    choice: dict[str, Any],
    blocks: Blocks,
) -> None:
    """All in one kernel."""
    sizes = (tokens.shape[0], router.shape[0], tokens.shape[1])
    route_kernel[(triton.cdiv(tokens.shape[0], blocks.tokens),)](
        tokens,
        router,
        *addresses,
        *sizes,
        tokens.stride(0),
        router.stride(0),
        *numbers,
        **choice,
        PRECISION=PRECISION,
        TOKENS=blocks.tokens,
        EXPERTS=blocks.experts,
        WIDTH=blocks.width,
        num_warps=blocks.warps,
    )


def _spread(
    tokens: Tensor,
    router: Tensor,
    addresses: tuple[Tensor | None, ...],
    numbers: tuple[float, float],
    choice: dict[str, Any],
    blocks: Blocks,
) -> None:
    """The product in parts, then their sums and the choice."""
    num_tokens, num_experts = tokens.shape[0], router.shape[0]
    parts = _product(tokens, router, blocks)
    most = max(16, int(triton.next_power_of_2(num_experts)))
    block = max(1, 1024 // most)
    sizes = (parts.shape[0], num_tokens, num_experts)
    blocked = {"TOKENS": block, "EXPERTS": most}
    decide_kernel[(triton.cdiv(num_tokens, block),)](
        parts, *addresses, *sizes, *numbers, **choice, **blocked
    )


def _product(tokens: Tensor, router: Tensor, blocks: Blocks) -> Tensor:
    """Logits in parts that are still to be summed -> [P, T, E]."""
    (num_tokens, width), num_experts = tokens.shape, router.shape[0]
    share = triton.cdiv(triton.cdiv(width, blocks.parts), blocks.width) * blocks.width
    num_parts = max(1, triton.cdiv(width, share)) if share else 1
    shape = (num_parts, num_tokens, num_experts)
    parts = tokens.new_empty(shape, dtype=torch.float32)
    grid = (  # programs that read the same tokens follow one another
        triton.cdiv(num_experts, blocks.experts),
        triton.cdiv(num_tokens, blocks.tokens),
        num_parts,
    )
    product_kernel[grid](
        tokens,
        router,
        parts,
        num_tokens,
        num_experts,
        width,
        share,
        tokens.stride(0),
        router.stride(0),
        PRECISION=PRECISION,
        TOKENS=blocks.tokens,
        EXPERTS=blocks.experts,
        WIDTH=blocks.width,
        num_warps=blocks.warps,
        # Without a limit the assembler spills a little, to fit one more program.
        maxnreg=128 if tokens.dtype != torch.float32 and blocks.warps == 4 else None,
    )
    return parts


def _dense(x: Tensor) -> Tensor:
    """x [N, d], whose rows may lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _route_fake(
    tokens: Tensor,
    router: Tensor,
    bias: Tensor | None,
    balance_bias: Tensor | None,
    k: int,
    affinity: str,
    normalize: str,
    eps: float,
    scale: float,
    wants_logits: bool,
    wants_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, e = tokens.shape[0], router.shape[0]
    return (
        tokens.new_empty((t, e) if wants_logits else (0,), dtype=torch.float32),
        tokens.new_empty((t, e) if wants_scores else (0,), dtype=torch.float32),
        tokens.new_empty((t, k), dtype=torch.int64),
        tokens.new_empty((t, k), dtype=torch.float32),
    )


def _route_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, router, bias, _, _, affinity, normalize, eps, scale, _, _ = inputs
    logits, scores, experts, weights = output
    kept = logits if affinity == "none" else scores
    ctx.save_for_backward(tokens, router, bias, kept, experts, weights)
    ctx.settings = (affinity, normalize, eps, scale)
    ctx.set_materialize_grads(False)


def _route_backward(
    ctx: Any,
    grad_logits: Tensor | None,
    grad_scores: Tensor | None,
    _: None,
    grad_weights: Tensor | None,
) -> tuple[Any, ...]:
    tokens, router, bias, kept, experts, weights = ctx.saved_tensors
    wants = ctx.needs_input_grad[:3]
    grads = (grad_logits, grad_scores, grad_weights)
    if all(grad is None for grad in grads):
        return (None,) * 11
    found = _route_gradient(
        *grads, tokens, router, bias, kept, experts, weights, *ctx.settings, *wants
    )
    given = (x if want else None for x, want in zip(found, wants, strict=True))
    return (*given, *(None,) * 8)


_route_gradient = define(__name__, "route_gradient", gradients, fake_gradients)
_op = define(__name__, "route", _route, _route_fake, _route_save, _route_backward)


def route(
    tokens: Tensor,
    router: Tensor,
    bias: Tensor | None = None,
    balance_bias: Tensor | None = None,
    *,
    k: int,
    affinity: str = "softmax",
    normalize: str = "none",
    eps: float = 0.0,
    scale: float = 1.0,
    wants_logits: bool = True,
    wants_scores: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and scores [T, E] of tokens [T, d], experts chosen [T, k] and their weights [T, k].

    router [E, d] and all that comes of it are float32. affinity: softmax, sigmoid or none, which
    makes scores of logits. The k best by score, plus balance_bias [E], are chosen, best first,
    ties to the lowest index. normalize: none weighs by score, sum divides scores by their sum
    plus eps, softmax_over_kept takes the softmax of the chosen logits. scale comes last. Logits
    and scores that are not wanted are empty; the backward pass keeps scores all the same.
    """
    differentiable = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (tokens, router, bias)
    )
    same = affinity == "none"
    logits, scores, experts, weights = _op(
        tokens,
        router,
        bias,
        balance_bias,
        k,
        affinity,
        normalize,
        eps,
        scale,
        wants_logits or (same and (wants_scores or differentiable)),
        not same and (wants_scores or differentiable),
    )
    return logits, logits if same else scores, experts, weights
