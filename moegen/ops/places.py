"""Places in the buffers of experts: who comes first, who is refused, who goes elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from moegen.ops.op import op
from moegen.ops.routing import _keys


@op(flops=lambda experts, num_experts, group=None, priority=None: 0)
def position_in_expert(
    experts: Tensor,
    num_experts: int,
    group: int | None = None,
    priority: Tensor | None = None,
) -> Tensor:
    """How many choices of the same expert come before: experts [T, K] -> [T, K] int64.

    All first choices come before all second choices, each in token order, as capacity is given
    out. A priority [T] puts tokens of the highest first, within a rank; one [T, K] orders choices
    whatever their rank. group: so many tokens in a row compete with each other only. Positions of
    choices that are routed nowhere (expert num_experts) mean nothing.
    """
    keys, count = experts, num_experts
    if group is not None:
        groups = -(-experts.shape[0] // max(group, 1))
        token = torch.arange(experts.shape[0], device=experts.device)
        keys = keys + (token // max(group, 1) * (num_experts + 1)).unsqueeze(-1)
        count = groups * (num_experts + 1)
    in_turn = keys.t().flatten()
    turn = None
    if priority is not None:
        # Sorting by priority first and by rank then; both sorts keep the order of equals.
        urgency = priority.detach()
        urgency = urgency.unsqueeze(-1) if urgency.dim() == 1 else urgency
        urgency = urgency.expand(experts.shape).t()
        dim = 0 if priority.dim() == 2 else 1
        flat = urgency.flatten() if dim == 0 else urgency
        turn = torch.sort(flat, dim=-1, descending=True, stable=True).indices
        if dim == 1:
            first = torch.arange(experts.shape[1], device=experts.device)
            turn = (turn + (first * experts.shape[0]).unsqueeze(-1)).flatten()
        in_turn = in_turn[turn]
    sorted_keys, order = torch.sort(_keys(in_turn, count), stable=True)
    # One more than there are experts, for choices that are routed nowhere.
    every = torch.arange(count + 1, device=experts.device).to(sorted_keys.dtype)
    starts = torch.searchsorted(sorted_keys, every, out_int32=True)
    rank = torch.arange(order.shape[0], device=order.device)
    position = rank - starts.index_select(0, sorted_keys.int())
    places = order if turn is None else turn[order]
    placed = torch.empty_like(order).scatter_(0, places, position)
    return placed.view(experts.shape[1], experts.shape[0]).t()


@op(
    flops=lambda experts, position, slots, nowhere, num_experts, spared=None: 0,
)
def refuse(
    experts: Tensor,
    position: Tensor,
    slots: int,
    nowhere: int,
    num_experts: int,
    spared: Tensor | None = None,
) -> Tensor:
    """experts [T, K], `nowhere` where the position [T, K] is beyond the slots.

    Experts from num_experts on compute nothing and refuse nobody; nor are tokens refused that are
    spared [T].
    """
    beyond = position >= slots
    if nowhere > num_experts:
        beyond = beyond & (experts < num_experts)
    if spared is not None:
        beyond = beyond & ~spared.unsqueeze(-1)
    return experts.masked_fill(beyond, nowhere)


@op(effect=True, flops=lambda valid, sequences, share, training: 0)
def sparing(valid: Tensor, sequences: int, share: float, training: bool) -> Tensor:
    """Which tokens [T] are of sequences that are never refused: a share of them, drawn anew."""
    if not training:
        return torch.zeros_like(valid)
    drawn = torch.rand(sequences, 1, device=valid.device) < share
    return drawn.expand(-1, valid.shape[0] // max(sequences, 1)).flatten()


@op(flops=lambda wanted, num_experts, slots, valid, group: 0)
def next_best(
    wanted: Tensor, num_experts: int, slots: int, valid: Tensor, group: int | None
) -> Tensor:
    """One expert with room for each token: wanted [T, P], best first -> [T, 1].

    Pass by pass, tokens without a place try their next expert, which takes the first of them in
    token order; num_experts for those who find none, and for padding (Switch Transformer, no
    token left behind).
    """
    size = wanted.shape[0] if group is None else max(group, 1)
    groups = -(-wanted.shape[0] // max(size, 1))
    token = torch.arange(wanted.shape[0], device=wanted.device)
    offset = token // max(size, 1) * num_experts
    placed = torch.full_like(wanted[:, 0], num_experts)
    held = torch.zeros(
        groups * num_experts + 1, dtype=torch.int64, device=wanted.device
    )
    for rank in range(wanted.shape[1]):
        tries = valid & (placed == num_experts)
        key = torch.where(tries, wanted[:, rank] + offset, groups * num_experts)
        position = position_in_expert(key.unsqueeze(-1), groups * num_experts)[:, 0]
        fits = tries & (position + held[key] < slots)
        placed = torch.where(fits, wanted[:, rank], placed)
        held = held.scatter_add(0, key, fits.long())
    return placed.unsqueeze(-1)
