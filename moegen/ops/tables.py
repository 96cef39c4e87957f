"""Tables by token id: the experts of every id of the vocabulary, decided before training.

They are made on the CPU, so that a seed means the same table on every device.
"""

import heapq

import torch
from torch import Tensor

from moegen.ops.op import op


@op()
def zipf_frequencies(ids: int) -> Tensor:
    """What is assumed where no counts are given: 1 / (id + 1), [ids] float64.

    That is Zipf's law for vocabularies that list frequent tokens first, as those of BPE do.
    """
    return 1 / torch.arange(1, ids + 1, dtype=torch.float64, device="cpu")


@op()
def random_table(ids: int, experts: int, seed: int) -> Tensor:
    """An expert drawn evenly for every id, [ids] int64: hash layers (Roller et al. 2021)."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(experts, (ids,), generator=generator, device="cpu")


@op()
def balanced_table(frequencies: Tensor, experts: int) -> Tensor:
    """Experts that are asked for equally often (Roller et al. 2021): [ids] -> [ids] int64.

    Ids go by falling frequency, equal ones in order, each to the expert with the least so far,
    the first of equal ones.
    """
    known, order = torch.sort(frequencies.cpu(), descending=True, stable=True)
    loads = [(0, expert) for expert in range(experts)]
    chosen = []
    for frequency in known.tolist():
        load, expert = loads[0]
        chosen.append(expert)
        heapq.heapreplace(loads, (load + frequency, expert))
    table = torch.tensor(chosen, dtype=torch.int64, device="cpu")
    return torch.empty_like(order).scatter_(0, order, table)


@op()
def balanced_zipf_table(ids: int, experts: int) -> Tensor:
    """The balanced table of ids whose frequencies follow Zipf's law, [ids] int64."""
    return balanced_table(zipf_frequencies(ids), experts)


@op()
def frequent_ids(frequencies: Tensor, coverage: float) -> Tensor:
    """The fewest ids that make up the fraction `coverage` of all: [ids] -> [ids] bool.

    By falling frequency, equal ones in order: an id is frequent if those before it make up less.
    """
    known, order = torch.sort(frequencies.cpu().double(), descending=True, stable=True)
    sums = torch.nn.functional.pad(known.cumsum(0), (1, 0))
    frequent = sums[:-1] / sums[-1:] < coverage
    return torch.empty_like(frequent).scatter_(0, order, frequent)


@op()
def visible_experts_by(
    frequencies: Tensor,
    experts: int,
    frequent: int,
    rare: int,
    coverage: float,
    seed: int,
) -> Tensor:
    """The experts that every id may use (MaskMoE, Su et al. 2024): [ids] -> [ids, experts] bool.

    An id sees `frequent` random experts if it is among the ids that make up the fraction
    `coverage` of all tokens, else `rare` ones.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    draws = torch.rand(
        frequencies.shape[0],
        experts,
        generator=generator,
        dtype=torch.float64,
        device="cpu",
    )
    order = torch.sort(draws, dim=1, stable=True).indices
    often = frequent_ids(frequencies, coverage).unsqueeze(1)
    rank = torch.arange(experts, device="cpu")
    seen = torch.where(often, rank < frequent, rank < rare)
    return torch.empty_like(seen).scatter_(1, order, seen)


@op()
def visible_experts(
    ids: int, experts: int, frequent: int, rare: int, coverage: float, seed: int
) -> Tensor:
    """The same [ids, experts] bool for ids whose frequencies follow Zipf's law."""
    known = zipf_frequencies(ids)
    return visible_experts_by(known, experts, frequent, rare, coverage, seed)
