"""Choosing experts and ordering the choices: everything a router needs besides its scores."""

import torch
from torch import Tensor

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


@op(flops=lambda experts, num_experts: 0)
def position_in_expert(experts: Tensor, num_experts: int) -> Tensor:
    """How many earlier choices went to the same expert: [T, K] -> [T, K] int64.

    All first choices come before all second choices, each in token order, as capacity is given
    out. Positions of choices that are routed nowhere (expert num_experts) mean nothing.
    """
    by_rank = _keys(experts, num_experts).t()
    keys, order = torch.sort(by_rank.flatten(), stable=True)
    starts = torch.nn.functional.pad(_ends(keys, num_experts), (1, 0))  # [E + 1]
    rank = torch.arange(order.shape[0], device=order.device)
    position = rank - starts.index_select(0, keys.int())
    return torch.empty_like(order).scatter_(0, order, position).view(by_rank.shape).t()


@op(flops=lambda experts, num_experts, valid: 0)
def expert_load(experts: Tensor, num_experts: int, valid: Tensor) -> Tensor:
    """Choices per expert, of valid tokens only: [T, K], valid [T] bool -> [E] int64.

    Integer sums are exact in any order, so scattering is deterministic here; bincount would
    make the shape depend on the data.
    """
    counted = valid.unsqueeze(-1).expand(experts.shape).flatten().long()
    load = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    return load.scatter_add_(0, experts.flatten(), counted)[:num_experts]
