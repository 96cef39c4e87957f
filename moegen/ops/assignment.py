"""The best balanced assignment of tokens to experts, after the BASE layer (Lewis et al. 2021).

An auction (Bertsekas) finds what a place at each expert is worth: tokens bid for the expert they
like best, each expert keeps the highest bids that it has places for, and its price rises to the
lowest of them. At these prices nearly every token can simply take its best expert. The few that
are too many somewhere move on along the cheapest chains of moves between experts (successive
shortest paths), which keeps every token at an expert that is best for it at the prices of the
moment. That makes the end optimal, whatever the auction found.

All tokens bid at once and no loop is over tokens: T tokens and E experts take tensors of [T, E]
on the device and [E, E] on the host.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from moegen.ops.op import op


def _define_assignment(
    kernel: Callable[[Tensor, Tensor], Tensor], fake: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """A torch.library op, so that compile and export take the loops whole.

    A process may hold several copies of this file: the first defines the op, the others use it.
    """
    if not hasattr(torch.ops.moegen, "balanced_assignment"):
        definition = torch.library.custom_op(
            "moegen::balanced_assignment",
            kernel,
            mutates_args=(),
            tags=(
                torch.Tag.cudagraph_unsafe,
            ),  # how often it loops is read by the host
        )
        definition.register_fake(fake)
    return torch.ops.moegen.balanced_assignment


def _finite(scores: Tensor) -> tuple[Tensor, float]:
    """Scores [T, E] as float64, 0 for the best of every token, and the widest span of a token.

    NaN counts as the lowest of its token. Infinities, and all beyond 1e150, lie so far off that one
    of them outweighs what a chain of moves, at most one per expert, can gain in other scores.
    """
    values = scores.double()
    odd = ~(values.abs() < 1e150)
    top = values.masked_fill(odd, -torch.inf).amax(1, keepdim=True)
    low = values.masked_fill(odd, torch.inf).amin(1, keepdim=True)
    none = low > top
    top, low = top.masked_fill_(none, 0), low.masked_fill_(none, 0)
    span = (top - low).amax().item()
    far = (scores.shape[1] + 1) * (span or 1.0)
    values = torch.where(values.isnan(), low, values)
    return values.clamp_(low - far, top + far).sub_(top), span


def _higher_bids(expert: Tensor, bid: Tensor, experts: int) -> Tensor:
    """How many bids [N] for the same expert [N] are higher, ties in order -> [N]."""
    order = torch.sort(bid, descending=True, stable=True).indices
    keys, by_expert = torch.sort(expert[order], stable=True)
    order = order[by_expert]
    starts = torch.searchsorted(keys, torch.arange(experts, device=keys.device))
    place = torch.arange(order.shape[0], device=order.device) - starts[keys]
    return torch.empty_like(order).scatter_(0, order, place)


def _bid(values: Tensor, price: Tensor, step: float) -> Tensor:
    """Prices [E] after an auction that starts from `price`, where bids rise by `step` at least.

    Ends when hardly any token [T, E] is without an expert, or after so many rounds.
    """
    tokens, experts = values.shape
    places = -(-tokens // experts)
    price = price.clone()
    waiting = torch.arange(tokens, device=values.device)
    owner = torch.full_like(waiting, experts)  # `experts` for a token without one
    bids = values.new_zeros(tokens)
    for _ in range(experts + 32):
        if waiting.shape[0] <= experts:
            break
        profit = values[waiting] - price
        best = profit.argmax(1, keepdim=True)
        first = profit.gather(1, best).squeeze(1)
        second = profit.scatter_(1, best, -torch.inf).amax(1)
        best = best.squeeze(1)
        owner[waiting] = best
        bids[waiting] = price[best] + (first - second + step)
        # Only experts that got a bid choose anew.
        asked = torch.zeros(experts + 1, dtype=torch.bool, device=values.device)
        asked[best] = True
        rivals = asked[owner].nonzero().squeeze(1)
        place = _higher_bids(owner[rivals], bids[rivals], experts)
        last = rivals[place == places - 1]
        price[owner[last]] = bids[last]
        waiting = rivals[place >= places]
        owner[waiting] = experts
    return price


def _cheapest(costs: Tensor, excess: Tensor) -> tuple[list[int], Tensor]:
    """The shortest way [experts] from too many tokens to too few, and prices to make it free.

    costs [E, E] >= 0 of a move from row to column, excess [E]: tokens beyond the places.
    """
    far = torch.where(excess > 0, 0.0, torch.inf).double()
    before = torch.full_like(excess, -1)
    for _ in range(excess.shape[0]):
        nearest = (far.unsqueeze(1) + costs).min(0)
        nearer = nearest.values < far
        if not nearer.any():
            break
        far = torch.where(nearer, nearest.values, far)
        before = torch.where(nearer, nearest.indices, before)
    end = far.masked_fill(excess >= 0, torch.inf).argmin()
    origins, way = before.tolist(), [int(end)]
    while origins[way[-1]] >= 0:
        way.append(origins[way[-1]])
    return way[::-1], (far[end] - far).clamp_(min=0)


def _leave(values: Tensor, owner: Tensor, expert: int) -> Tensor:
    """What its tokens lose, at least, that leave an expert for each of the others -> [E]."""
    own = values[(owner == expert).nonzero().squeeze(1)]
    if own.shape[0] == 0:
        return own.new_full((own.shape[1],), torch.inf)
    return (own[:, expert, None] - own).amin(0)


def _as_good(
    values: Tensor, owner: Tensor, price: Tensor, move: tuple[int, int], slack: float
) -> Tensor:
    """Tokens of the first expert to which the second is worth as much as any -> [at least 1]."""
    own = (owner == move[0]).nonzero().squeeze(1)
    profit = values[own] - price
    loss = profit.amax(1) - profit[:, move[1]]
    return own[loss <= loss.amin().clamp(min=slack)]


def _settle(
    values: Tensor, price: Tensor, slack: float, limit: int
) -> tuple[Tensor, Tensor, bool]:
    """Experts [T] that are the best at some prices [E], those prices, and whether all is even.

    Each step moves tokens that are equally well off along one way, and so brings an expert with
    too many closer to its number; at most `limit` steps are made. Where E does not divide T, a
    place at all but T % E experts is blocked. A block is a token that likes all experts alike,
    except that no expert takes two.
    """
    tokens, experts = values.shape
    owner = (values - price).argmax(1)
    counts = torch.bincount(owner, minlength=experts).cpu()
    host = price.cpu()  # what is known per expert is little, and searched on the host
    blocked = torch.zeros(experts, dtype=torch.bool, device="cpu")
    if tokens % experts:
        cheap = torch.sort(host, stable=True).indices[: experts - tokens % experts]
        blocked[cheap] = True
    excess = counts + blocked.long() + tokens // -experts
    leave = torch.stack([_leave(values, owner, e) for e in range(experts)]).cpu()
    for _ in range(limit):
        if not excess.any():
            break
        costs = torch.where(blocked.unsqueeze(1) & ~blocked, leave.clamp(max=0), leave)
        costs = (costs - host.unsqueeze(1) + host).clamp_(min=0)
        way, rise = _cheapest(costs, excess)
        host = host + rise
        price = host.to(price.device)
        size = min(int(excess[way[0]]), -int(excess[way[-1]]))
        movers: list[tuple[int, Tensor]] = []
        for start, end in pairwise(way):
            if blocked[start] and not blocked[end] and leave[start, end] > 0:
                blocked[start], blocked[end], size = False, True, 1
            else:
                same = _as_good(values, owner, price, (start, end), slack)
                movers.append((end, same))
                size = min(size, same.shape[0])
        for end, same in movers:
            owner[same[:size]] = end
        excess[way[0]] -= size
        excess[way[-1]] += size
        leave[way] = torch.stack([_leave(values, owner, e) for e in way]).cpu()
    return owner, price, not excess.any()


def _assigned(scores: Tensor) -> Tensor:
    """Auctions with ever smaller steps, until ways between experts can do the rest."""
    tokens, experts = scores.shape
    if tokens == 0 or experts == 1:
        return scores.new_zeros(tokens, 1, dtype=torch.int64)
    values, span = _finite(scores)
    slack = 1e-12 * (span or 1.0)
    few = 2 * experts
    price = values.mean(0)  # makes up for what all tokens think of an expert
    rest = values - price
    rest -= rest.mean(1, keepdim=True)
    step = (rest.amax() - rest.amin()).item()
    before = 0
    while step > slack:
        step /= 8
        price = _bid(values, price, step)
        counts = torch.bincount((values - price).argmax(1), minlength=experts)
        excess = int((counts + tokens // -experts).clamp_(min=0).sum())
        # Many equal tokens stay at one expert whatever the step, but move as one.
        if excess <= few or 0 < before < 2 * excess:
            owner, price, even = _settle(values, price, slack, few)
            if even:
                return owner.unsqueeze(1)
        before = excess
    return _settle(values, price, slack, tokens)[0].unsqueeze(1)


def _assignment_kernel(scores: Tensor, valid: Tensor) -> Tensor:
    """Real tokens share the places; padding, which none is kept for, is said to be at expert 0."""
    owner = scores.new_zeros(scores.shape[0], 1, dtype=torch.int64)
    owner[valid] = _assigned(scores[valid])
    return owner


def _assignment_fake(scores: Tensor, valid: Tensor) -> Tensor:
    return scores.new_empty(scores.shape[0], 1, dtype=torch.int64)


_balanced_assignment = _define_assignment(_assignment_kernel, _assignment_fake)


@op(flops=lambda scores, valid=None: 0)
def balanced_assignment(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """The expert of every token, so that the total score is highest: [T, E] -> [T, 1] int64.

    Every expert gets T / E tokens, rounded down or up. The total is within T * 1e-12 of the
    optimum, as a fraction of the widest span of a token's finite scores; among equal optima
    it picks one, always the same. A NaN counts as the token's lowest score, and -inf is taken only
    where it must be. Tokens that are not valid [T] take no place; what is returned for them means
    nothing.
    """
    if valid is None:
        valid = torch.ones_like(scores[:, 0], dtype=torch.bool)
    return _balanced_assignment(scores.detach(), valid)
