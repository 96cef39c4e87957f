"""Choosing experts and ordering the choices: everything a router needs besides its scores."""

import torch
from torch import Tensor

from moegen.ops.assignment import balanced_assignment
from moegen.ops.op import op


def _keys(experts: Tensor, num_experts: int) -> Tensor:
    """Expert numbers in the narrowest type that holds them, since radix sorts pay per byte."""
    return experts.to(torch.int16 if num_experts < 2**15 else torch.int32)


def _ends(sorted_keys: Tensor, num_experts: int) -> Tensor:
    """Where each expert's run ends among sorted keys [N] -> [E] int32."""
    experts = torch.arange(
        num_experts, dtype=sorted_keys.dtype, device=sorted_keys.device
    )
    return torch.searchsorted(sorted_keys, experts, right=True, out_int32=True)


@op(flops=lambda experts, num_experts: 0)
def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Group choices by expert, in token order: [T, K] -> order [N] int64, ends [E] int32.

    Row i is choice order[i] of the flattened choices, so of token order[i] // K. Choices of
    "expert" num_experts are routed nowhere: their rows come last, from ends[-1] on.
    """
    keys, order = torch.sort(_keys(experts, num_experts).flatten(), stable=True)
    return order, _ends(keys, num_experts)


@op(flops=lambda scores, k: 0)
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


@op(flops=lambda experts, num_experts, valid: 0)
def expert_load(experts: Tensor, num_experts: int, valid: Tensor) -> Tensor:
    """Choices per expert, of valid tokens only: [T, K], valid [T] bool -> [E] int64.

    Integer sums are exact in any order, so scattering is deterministic here; bincount would
    make the shape depend on the data.
    """
    counted = valid.unsqueeze(-1).expand(experts.shape).flatten().long()
    load = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    return load.scatter_add_(0, experts.flatten(), counted)[:num_experts]


@op(
    flops=lambda weights, kept, nowhere, eps: 0,
    saves=("weights", "out"),
    extra=lambda weights, kept, nowhere, eps: (
        weights.shape[0] * (weights.dtype.itemsize + 1) + weights.numel()
    ),
)
def kept_weights(weights: Tensor, kept: Tensor, nowhere: int, eps: float) -> Tensor:
    """weights [T, K] over the sum of those whose expert is not `nowhere`; 0 if there is none."""
    held = weights.masked_fill(kept == nowhere, 0)
    total = held.sum(-1, keepdim=True) + eps
    return held / torch.where(total > 0, total, 1)


@op(
    flops=lambda weights, experts, low, high: 0,
    extra=lambda weights, experts, low, high: experts.numel(),
)
def weight_of_free(weights: Tensor, experts: Tensor, low: int, high: int) -> Tensor:
    """The sum [T] of the weights [T, K] whose expert is from low up to, not with, high."""
    free = (experts >= low) & (experts < high)
    return weights.masked_fill(~free, 0).sum(-1)


@op(flops=lambda ranked, slots, group: 0)
def best_tokens(ranked: Tensor, slots: int, group: int) -> Tensor:
    """Each expert's best tokens of each group: ranked [E, T] -> [E, G * slots] int64.

    Ties go to the first token; within a group the best come first.
    """
    rows = torch.unflatten(ranked, -1, (ranked.shape[-1] // max(group, 1), group))
    start = torch.arange(rows.shape[1], device=ranked.device) * group
    return (top_k(rows, slots) + start.unsqueeze(-1)).flatten(1)


@op(
    flops=lambda weights, tokens, num_tokens, count, eps=0.0: 0,
    saves=lambda weights, tokens, num_tokens, count, eps=0.0: (
        () if count else ("weights", "tokens")
    ),
    extra=lambda weights, tokens, num_tokens, count, eps=0.0: (
        weights.numel() * (weights.dtype.itemsize + (0 if count else 1))
    ),
)
def shares_of_token(
    weights: Tensor, tokens: Tensor, num_tokens: int, count: bool, eps: float = 0.0
) -> Tensor:
    """Weights [E, C] of tokens [E, C] over the sum of those of the same token, or their count."""
    taken = weights.new_zeros(weights.shape[0], num_tokens)
    taken = taken.scatter(-1, tokens, 1.0 if count else weights)
    total = taken.sum(0)[tokens] + eps
    return weights / torch.where(total > 0, total, 1)


@op(flops=lambda experts, ends, inner: 0)
def nested_experts(experts: Tensor, ends: Tensor, inner: int) -> Tensor:
    """Choices [N, k] among an expert's inner ones as numbers among those of all experts.

    Row i is one of expert e if ends[e - 1] <= i < ends[e]. Rows of no expert and choices of none
    (from inner on) become E * inner: routed nowhere.
    """
    row = torch.arange(experts.shape[0], device=experts.device, dtype=ends.dtype)
    outer = torch.searchsorted(ends, row, right=True).unsqueeze(-1)
    nowhere = ends.shape[0] * inner
    known = (experts < inner) & (outer < ends.shape[0])
    return torch.where(known, outer * inner + experts, nowhere)


@op(effect=True, flops=lambda scores, valid, training: 0)
def balanced_or_best(scores: Tensor, valid: Tensor, training: bool) -> Tensor:
    """An expert for each token, scores [T, E] -> [T, 1]: balanced in training, else its best.

    Padding, where valid [T] is false, takes no place of real tokens.
    """
    return balanced_assignment(scores, valid) if training else top_k(scores, 1)
