"""The operations of this model: plain PyTorch, one function each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def write_cache(cache: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Write values [B, H, T, d] to cache [B, H, L, d] at positions [T], in place; the cache."""
    return cache.index_copy_(2, positions, values.to(cache.dtype))


def move_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """bias += rate * sign(mean load - load), in place; load [E] counts the step's choices."""
    counts = load.to(bias.dtype)
    with torch.no_grad():
        return bias.add_((counts.mean() - counts).sign(), alpha=rate)


def _define(
    name: str, kernel: Callable[..., Tensor], fake: Any, save: Any, backward: Any
) -> Any:
    """A torch.library op, which compile and export take whole.

    A process may hold several copies of this file, each in its own package: the first defines
    the op and the others use that one, so a change in meaning needs a change of name.
    """
    if not hasattr(torch.ops.moegen, name):
        definition = torch.library.custom_op(f"moegen::{name}", kernel, mutates_args=())
        definition.register_fake(fake)
        definition.register_autograd(backward, setup_context=save)
    return getattr(torch.ops.moegen, name)


def _inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation [N]; indices do not repeat, so the scatter is deterministic."""
    return torch.empty_like(order).scatter_(
        0, order, torch.arange(order.shape[0], device=order.device)
    )


def _starts(order: Tensor, num_tokens: int) -> Tensor:
    """Where the choices of each token start among all N, K of them a token -> [T]."""
    return torch.arange(num_tokens, device=order.device) * (
        order.shape[0] // max(num_tokens, 1)
    )


def _sum_entries(
    rows: Tensor, entries: Tensor, starts: Tensor, weight: Tensor | None
) -> Tensor:
    """Weighted sums of rows[entries] over the runs that begin at starts, fused, without atomics."""
    return F.embedding_bag(entries, rows, starts, mode="sum", per_sample_weights=weight)


def _gather_rows_kernel(tokens: Tensor, order: Tensor) -> Tensor:
    """Row i is token order[i] // K; the gradient sums a token's rows: no scatter, no atomics."""
    k = order.shape[0] // max(tokens.shape[0], 1)
    return tokens.index_select(0, order // max(k, 1))


def _gather_rows_fake(tokens: Tensor, order: Tensor) -> Tensor:
    return tokens.new_empty(order.shape[0], tokens.shape[1])


def _gather_rows_save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    tokens, order = inputs
    ctx.save_for_backward(order)
    ctx.num_tokens = tokens.shape[0]


def _gather_rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (order,) = ctx.saved_tensors
    starts = _starts(order, ctx.num_tokens)
    return _sum_entries(grad.contiguous(), _inverse(order), starts, None), None


def _sum_rows_kernel(
    rows: Tensor, weight: Tensor, order: Tensor, starts: Tensor, token: Tensor
) -> Tensor:
    """Sum rows by token: weight [N] is sorted by token, entry order[i] belongs to row i.

    Token t owns the entries from starts[t] on; token [N], that of each row, serves the gradient.
    """
    return _sum_entries(rows.contiguous(), _inverse(order), starts, weight)


def _sum_rows_fake(
    rows: Tensor, weight: Tensor, order: Tensor, starts: Tensor, token: Tensor
) -> Tensor:
    return rows.new_empty(starts.shape[0], rows.shape[1])


def _sum_rows_save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    rows, weight, order, _, token = inputs
    ctx.save_for_backward(rows, weight, order, token)


def _sum_rows_backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor, Tensor, None, None, None]:
    rows, weight, order, token = ctx.saved_tensors
    grad_rows = grad.index_select(0, token)
    grad_weight = torch.empty_like(weight).scatter_(
        0, order, (grad_rows * rows).sum(-1)
    )
    # Scaled in place: one buffer of all rows less in the backward pass.
    grad_rows.mul_(weight.index_select(0, order).unsqueeze(-1))
    return grad_rows, grad_weight, None, None, None


_gather_rows = _define(
    "gather_rows",
    _gather_rows_kernel,
    _gather_rows_fake,
    _gather_rows_save,
    _gather_rows_backward,
)


_sum_rows = _define(
    "sum_rows", _sum_rows_kernel, _sum_rows_fake, _sum_rows_save, _sum_rows_backward
)


def gather_rows(tokens: Tensor, order: Tensor) -> Tensor:
    """The token of every row: tokens [T, d], order [N] -> [N, d]."""
    return _gather_rows(tokens, order)  # type: ignore[no-any-return]


def combine(rows: Tensor, order: Tensor, weight: Tensor) -> Tensor:
    """Sum each token's rows by weight: rows [N, d], order [N], weight [T, K] -> [T, d]."""
    num_tokens, k = weight.shape
    weight = weight.to(rows.dtype).flatten()
    starts = _starts(order, num_tokens)
    return _sum_rows(rows, weight, order, starts, order // k)  # type: ignore[no-any-return]


def _aligned(x: Tensor) -> Tensor:
    """The matrices x [..., r, c] as grouped_mm reads them: strides of one and of whole 16 bytes."""
    if x.stride(-1) != 1 and x.stride(-2) == 1:
        return _aligned(x.transpose(-1, -2)).transpose(-1, -2)
    step, width = 16 // x.element_size(), x.shape[-1]
    whole = (
        all(stride % step == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    )
    if whole and x.stride(-1) == 1 and x.stride(-2) >= width:
        return x
    padded = x.new_zeros(*x.shape[:-1], -(-width // step) * step)
    return padded.narrow(-1, 0, width).copy_(x)


def _zero_tail(rows: Tensor, ends: Tensor) -> Tensor:
    """Zeros, in place, for the rows [N, n] of no expert, which grouped_mm leaves uninitialised."""
    if rows.device.type == "cpu":
        rows[int(ends[-1]) :] = 0
        return rows
    row = torch.arange(rows.shape[0], device=rows.device)
    return rows.masked_fill_(
        (row >= ends[-1]).unsqueeze(-1), 0
    )  # ends stays on the device


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    """(start, end) of every expert, for float64, which grouped_mm lacks: it checks, not trains."""
    stops = ends.tolist()
    return list(zip([0, *stops], stops, strict=False))


def _grouped_linear_kernel(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [N, d] of expert e times weight[e].T -> [N, n]."""
    if rows.shape[0] == 0 or rows.dtype == torch.float64:
        out = rows.new_zeros(rows.shape[0], weight.shape[1])
        for matrix, (start, end) in zip(weight, _spans(ends), strict=True):
            torch.mm(rows[start:end], matrix.t(), out=out[start:end])
        return out
    out = F.grouped_mm(_aligned(rows), _aligned(weight).transpose(1, 2), offs=ends)
    return _zero_tail(out.contiguous(), ends)  # CUDA pads odd widths


def _grouped_outer_kernel(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left [N, n] transposed times right [N, d], within each expert -> [E, n, d]."""
    if left.shape[0] == 0 or left.dtype == torch.float64:
        out = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
        for matrix, (start, end) in zip(out, _spans(ends), strict=True):
            torch.mm(left[start:end].t(), right[start:end], out=matrix)
        return out
    return F.grouped_mm(_aligned(left).t(), _aligned(right), offs=ends).contiguous()


def _grouped_linear_fake(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _grouped_outer_fake(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_linear_backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, ends = ctx.saved_tensors
    wants_rows, wants_weight, _ = ctx.needs_input_grad
    return (
        _grouped_linear(grad, weight.transpose(1, 2), ends) if wants_rows else None,
        _grouped_outer(grad, rows, ends) if wants_weight else None,
        None,
    )


def _grouped_outer_backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    left, right, ends = ctx.saved_tensors
    wants_left, wants_right, _ = ctx.needs_input_grad
    return (
        _grouped_linear(right, grad, ends) if wants_left else None,
        _grouped_linear(left, grad.transpose(1, 2), ends) if wants_right else None,
        None,
    )


_grouped_linear = _define(
    "grouped_linear",
    _grouped_linear_kernel,
    _grouped_linear_fake,
    _save_inputs,
    _grouped_linear_backward,
)


_grouped_outer = _define(
    "grouped_outer",
    _grouped_outer_kernel,
    _grouped_outer_fake,
    _save_inputs,
    _grouped_outer_backward,
)


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix: rows [N, d], weight [E, n, d] -> [N, n].

    Rows of no expert, from ends[-1] on, give zeros and get zero gradients, whatever they hold.
    """
    # Under autocast rows may come from a product in 16 bits.
    return _grouped_linear(rows.to(weight.dtype), weight, ends)  # type: ignore[no-any-return]


def entropy(probability: Tensor) -> Tensor:
    """-sum p ln p over the last dimension, 0 ln 0 being 0, in nats."""
    positive = torch.where(probability > 0, probability, 1)
    return -(probability * positive.log()).sum(-1)


def router_entropy(scores: Tensor, valid: Tensor) -> Tensor:
    """Mean entropy of a real token's scores [T, E], brought to sum to one; a statistic."""
    scores = scores.detach()
    tiny = torch.finfo(scores.dtype).tiny
    share = scores / scores.sum(-1, keepdim=True).clamp(min=tiny)
    return masked_mean(entropy(share), valid)


def real_tokens(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Which of ids [B, S] are real, bool [B * S]; all of them if there is no mask."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool).flatten()
    return mask.bool().flatten()


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of values [T, ...] over the tokens where valid [T] is true; 0 if there is none."""
    values = values if values.is_floating_point() else values.float()
    kept = valid.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
    return (values * kept).sum(0) / kept.sum().clamp(min=1)


def sequence_balance_loss(
    scores: Tensor, experts: Tensor, valid: Tensor, sequences: int
) -> Tensor:
    """Balance inside each sequence, averaged over those not empty (DeepSeek-V3 section 2.1.2).

    scores [T, E], experts [T, k], valid [T]; T = sequences * length. For a sequence: the sum
    over experts of E / k * (share of its tokens that chose e) * (mean normalised score of e).
    """
    share = scores / scores.sum(-1, keepdim=True)
    shape = (sequences, scores.shape[0] // max(sequences, 1))
    real = torch.unflatten(valid, 0, shape).unsqueeze(-1).to(scores.dtype)
    tokens = real.sum(1)
    some = tokens.clamp(min=1)
    probability = (torch.unflatten(share, 0, shape) * real).sum(1) / some
    chosen = torch.zeros_like(scores).scatter(-1, experts, 1.0)
    fraction = (torch.unflatten(chosen, 0, shape) * real).sum(1) / some
    per_sequence = (
        (fraction * probability).sum(-1) * scores.shape[-1] / experts.shape[-1]
    )
    return per_sequence.sum() / (tokens > 0).sum().clamp(min=1)


def sum_over_layers(routing: Sequence[Any], name: str) -> Tensor:
    """The sum of one auxiliary loss over the routed layers that have it."""
    return torch.stack([r.losses[name] for r in routing if name in r.losses]).sum()


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, S, V] at labels [B, S], in fp32; label -100 is left out.

    The logits at a position are held against the label of the next one.
    """
    predicted = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=-100)


def rope_frequencies(dim: int, theta: float, factor: float = 1.0) -> Tensor:
    """Angles per position, [dim / 2]: theta^(-2i/dim), divided by `factor` (linear scaling)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / (theta**exponents) / factor


def yarn_frequencies(
    dim: int,
    theta: float,
    factor: float,
    original: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """YaRN (Peng et al. 2023): keep fast dimensions, interpolate slow ones, ramp between."""
    plain = rope_frequencies(dim, theta)

    def turns_to_dim(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turns_to_dim(beta_fast), turns_to_dim(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2).float() - low) / width).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of x [..., S, r] by the angles of cos and sin [S, r/2]."""
    first, second = torch.unflatten(x, -1, (-1, 2)).unbind(-1)
    return torch.stack(
        (first * cos - second * sin, second * cos + first * sin), -1
    ).flatten(-2)


def _keys(experts: Tensor, num_experts: int) -> Tensor:
    """Expert numbers in the narrowest type that holds them, since radix sorts pay per byte."""
    return experts.to(torch.int16 if num_experts < 2**15 else torch.int32)


def _ends(sorted_keys: Tensor, num_experts: int) -> Tensor:
    """Where each expert's run ends among sorted keys [N] -> [E] int32."""
    experts = torch.arange(
        num_experts, dtype=sorted_keys.dtype, device=sorted_keys.device
    )
    return torch.searchsorted(sorted_keys, experts, right=True, out_int32=True)


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Group choices by expert, in token order: [T, K] -> order [N] int64, ends [E] int32.

    Row i is choice order[i] of the flattened choices, so of token order[i] // K. Choices of
    "expert" num_experts are routed nowhere: their rows come last, from ends[-1] on.
    """
    keys, order = torch.sort(_keys(experts, num_experts).flatten(), stable=True)
    return order, _ends(keys, num_experts)


def top_k(scores: Tensor, k: int) -> Tensor:
    """The k best-scored experts, best first, ties to the lowest index: [T, E] -> [T, k] int64."""
    scores = scores.detach()
    if scores.dtype == torch.float64:  # too wide to share an int64 with its index
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
        return best.contiguous()  # a view would keep the indices of all experts
    # torch.topk breaks ties as it likes, so make ties impossible: the order-preserving bits of the
    # score above, the index counted from the end below. Negative floats grow downwards in their
    # bits, which the xor turns around, and -0.0 must tie with 0.0.
    scores = scores.float()
    bits = scores.view(torch.int32)
    high = (
        (bits >> 31)
        .bitwise_and_(0x7FFFFFFF)
        .bitwise_xor_(bits)
        .masked_fill_(scores == 0, 0)
    )
    low = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return torch.topk(
        high.long().bitwise_left_shift_(32).bitwise_or_(low), k, dim=-1
    ).indices


def expert_load(experts: Tensor, num_experts: int, valid: Tensor) -> Tensor:
    """Choices per expert, of valid tokens only: [T, K], valid [T] bool -> [E] int64.

    Integer sums are exact in any order, so scattering is deterministic here; bincount would
    make the shape depend on the data.
    """
    counted = valid.unsqueeze(-1).expand(experts.shape).flatten().long()
    load = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    return load.scatter_add_(0, experts.flatten(), counted)[:num_experts]
