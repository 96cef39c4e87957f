"""Where every choice of an expert goes: rows grouped by expert, and the tiles over them.

T tokens with K choices each give N = T * K rows. Nothing here waits for the device: what depends
on the routing stays there, and sizes are bounds that follow from N alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import INTERPRET
from .library import define

CHUNK = 256  # choices that one program ranks, each against each
ALONE = 512  # choices up to which one program ranks all: decoding
STEP = 64 if INTERPRET else 16  # of these others at a time: more spill
MOST_EXPERTS = 4096  # beyond, counters of a program no longer fit into its registers


@triton.jit
def _keys(experts, choice, total, num_experts):
    """The expert of each choice; what is no expert's number is nowhere, which comes last."""
    expert = tl.load(experts + choice, mask=choice < total, other=num_experts)
    expert = tl.where((expert < 0) | (expert > num_experts), num_experts, expert)
    return expert.to(tl.int32)


@triton.jit
def _alone_kernel(
    experts,
    order,
    ends,
    total,
    num_experts,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program ranks all choices."""
    choice = tl.arange(0, CHUNK)
    keys = _keys(experts, choice, total, num_experts)
    place = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, CHUNK, STEP):
        other = first + tl.arange(0, STEP)
        theirs = _keys(experts, other, total, num_experts)[None, :]
        earlier = (theirs == keys[:, None]) & (other[None, :] < choice[:, None])
        place += tl.sum((earlier | (theirs < keys[:, None])).to(tl.int32), 1)
    tl.store(order + place, choice.to(tl.int64), mask=choice < total)
    bins = tl.arange(0, BINS)
    stops = tl.cumsum(tl.histogram(keys, BINS), 0)
    tl.store(ends + bins, stops, mask=bins < num_experts)


@triton.jit
def _count_kernel(
    experts,
    valid,
    counts,
    total,
    num_experts,
    K,
    HAS_VALID: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Choices of each expert in each chunk -> counts [chunks, BINS]."""
    chunk = tl.program_id(0)
    choice = chunk * CHUNK + tl.arange(0, CHUNK)
    keys = _keys(experts, choice, total, num_experts)
    if HAS_VALID:
        real = tl.load(valid + choice // K, mask=choice < total, other=0)
        keys = tl.where(real != 0, keys, num_experts)
    bins = tl.arange(0, BINS)
    tl.store(counts + chunk.to(tl.int64) * BINS + bins, tl.histogram(keys, BINS))


@triton.jit
def _scan_kernel(
    counts,
    before,
    totals,
    chunks,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """For each expert, its choices in all chunks before each -> before; in all -> totals."""
    bins = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    seen = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, chunks, ROWS):
        chunk = (first + tl.arange(0, ROWS))[:, None]
        at = chunk.to(tl.int64) * BINS + bins[None, :]
        found = tl.load(counts + at, mask=chunk < chunks, other=0)
        earlier = tl.cumsum(found, 0) - found + seen[None, :]
        tl.store(before + at, earlier, mask=chunk < chunks)
        seen += tl.sum(found, 0)
    tl.store(totals + bins, seen)


@triton.jit
def _place_kernel(
    experts,
    before,
    totals,
    order,
    ends,
    total,
    num_experts,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Each choice goes behind those of its expert in earlier chunks, and earlier in its own."""
    start = tl.program_id(0) * CHUNK
    choice = start + tl.arange(0, CHUNK)
    keys = _keys(experts, choice, total, num_experts)
    earlier = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, CHUNK, STEP):
        other = start + first + tl.arange(0, STEP)
        theirs = _keys(experts, other, total, num_experts)[None, :]
        same = (theirs == keys[:, None]) & (other[None, :] < choice[:, None])
        earlier += tl.sum(same.to(tl.int32), 1)
    bins = tl.arange(0, BINS)
    found = tl.load(totals + bins)
    stops = tl.cumsum(found, 0)
    row = tl.program_id(0).to(tl.int64) * BINS
    base = stops - found + tl.load(before + row + bins)
    place = tl.gather(base, keys, 0) + earlier
    tl.store(order + place, choice.to(tl.int64), mask=choice < total)
    if start == 0:
        tl.store(ends + bins, stops, mask=bins < num_experts)


def _bins(num_experts: int) -> int:
    """Counters of all experts, and of choices that go nowhere, padding among them."""
    return max(32, int(triton.next_power_of_2(num_experts + 1)))


def _sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    total = experts.numel()
    experts = experts.contiguous()
    if num_experts > MOST_EXPERTS:
        keys, order = torch.sort(experts.flatten(), stable=True)
        every = torch.arange(num_experts, dtype=keys.dtype, device=keys.device)
        return order, torch.searchsorted(keys, every, right=True, out_int32=True)
    order = experts.new_empty(total, dtype=torch.int64)
    if total == 0:
        return order, experts.new_zeros(num_experts, dtype=torch.int32)
    ends = experts.new_empty(num_experts, dtype=torch.int32)
    bins = _bins(num_experts)
    if total <= ALONE:
        chunk = max(32, triton.next_power_of_2(total))
        sizes = {"CHUNK": chunk, "BINS": bins, "STEP": STEP}
        _alone_kernel[(1,)](
            experts, order, ends, total, num_experts, **sizes, num_warps=8
        )
        return order, ends
    counts = _count(experts, num_experts, None)
    chunks = counts.shape[0]
    before, totals = torch.empty_like(counts), counts.new_empty(bins)
    sizes = {"BINS": bins, "ROWS": 64, "COLUMNS": 16}
    _scan_kernel[(bins // 16,)](counts, before, totals, chunks, **sizes)
    sizes = {"CHUNK": CHUNK, "BINS": bins, "STEP": STEP}
    _place_kernel[(chunks,)](
        experts, before, totals, order, ends, total, num_experts, **sizes
    )
    return order, ends


def _sort_by_expert_fake(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    order = experts.new_empty(experts.numel(), dtype=torch.int64)
    return order, experts.new_empty(num_experts, dtype=torch.int32)


def _count(experts: Tensor, num_experts: int, valid: Tensor | None) -> Tensor:
    """Choices of each expert in each chunk -> [chunks, bins] int32."""
    total, bins = experts.numel(), _bins(num_experts)
    chunks = triton.cdiv(total, CHUNK)
    counts = experts.new_empty(chunks, bins, dtype=torch.int32)
    _count_kernel[(chunks,)](
        experts,
        valid,
        counts,
        total,
        num_experts,
        experts.shape[-1],
        HAS_VALID=valid is not None,
        CHUNK=CHUNK,
        BINS=bins,
    )
    return counts


def _expert_load(experts: Tensor, num_experts: int, valid: Tensor) -> Tensor:
    if experts.numel() == 0:
        return experts.new_zeros(num_experts, dtype=torch.int64)
    if num_experts > MOST_EXPERTS:
        counted = valid.unsqueeze(-1).expand(experts.shape).flatten().long()
        load = counted.new_zeros(num_experts + 1)
        return load.scatter_add_(0, experts.flatten(), counted)[:num_experts].clone()
    real = valid.contiguous().view(torch.uint8)
    counts = _count(experts.contiguous(), num_experts, real)
    return counts[:, :num_experts].sum(0, dtype=torch.int64)


def _expert_load_fake(experts: Tensor, num_experts: int, valid: Tensor) -> Tensor:
    return experts.new_empty(num_experts, dtype=torch.int64)


_sort = define(__name__, "sort_by_expert", _sort_by_expert, _sort_by_expert_fake)
_load = define(__name__, "expert_load", _expert_load, _expert_load_fake)


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Group choices by expert, in token order: [T, K] -> order [N] int64, ends [E] int32.

    Row i is choice order[i] of the flattened choices, so of token order[i] // K. Choices of
    "expert" num_experts, or of none of the experts, are routed nowhere: their rows come last, from
    ends[-1] on. A counting sort, stable and without atomics: three launches, one up to 512
    choices.
    """
    return _sort(experts, num_experts)  # type: ignore[no-any-return]


def expert_load(experts: Tensor, num_experts: int, valid: Tensor) -> Tensor:
    """Choices per expert, of valid tokens only: [T, K], valid [T] bool -> [E] int64."""
    return _load(experts, num_experts, valid)  # type: ignore[no-any-return]


@triton.jit
def _tiles_kernel(
    ends,
    table,
    num_experts,
    bound,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Each program looks for the experts of TILES tiles among all."""
    bins = tl.arange(0, BINS)
    stop = tl.load(ends + bins, mask=bins < num_experts, other=0)
    start = tl.load(ends + bins - 1, mask=(bins > 0) & (bins < num_experts), other=0)
    tiles = tl.where(bins < num_experts, (stop - start + ROWS - 1) // ROWS, 0)
    last = tl.cumsum(tiles, 0)
    first = last - tiles
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    mine = (first[None, :] <= tile[:, None]) & (tile[:, None] < last[None, :])
    expert = tl.sum(tl.where(mine, bins[None, :] + 1, 0), 1) - 1
    shift = tl.sum(tl.where(mine, (start - first * ROWS)[None, :], 0), 1)
    row = tl.where(expert < 0, 0, tile * ROWS + shift)
    tl.store(table + tile, expert, mask=tile < bound)
    tl.store(table + bound + tile, row, mask=tile < bound)


def tile_table(ends: Tensor, rows: int, block: int) -> Tensor:
    """Tiles of `block` rows, each within one expert: ends [E], N rows -> int32 [2, bound].

    The first line holds the expert of each tile, -1 where there is no tile any more, the second
    its first row. An expert's tiles follow one another, those of expert 0 first. One launch, and
    no look at ends: bound = rows // block + min(E, rows) is enough whatever the routing.
    """
    num_experts = ends.shape[0]
    bound = rows // block + min(num_experts, rows)
    table = ends.new_empty(2, bound, dtype=torch.int32)
    if bound:
        bins = max(16, triton.next_power_of_2(num_experts))
        tiles = min(128, max(1, 8192 // bins))
        sizes = {"ROWS": block, "BINS": bins, "TILES": tiles}
        programs = triton.cdiv(bound, tiles)
        _tiles_kernel[(programs,)](ends, table, num_experts, bound, **sizes)
    return table


@triton.jit
def _inverse_kernel(order, inverse, total, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    choice = tl.load(order + row, mask=row < total, other=0)
    tl.store(inverse + choice, row, mask=row < total)


def inverse(order: Tensor) -> Tensor:
    """The row of each flattened choice: order [N] -> int32 [N]. One launch."""
    total = order.shape[0]
    rows = order.new_empty(total, dtype=torch.int32)
    if total:
        _inverse_kernel[(triton.cdiv(total, 1024),)](order, rows, total, BLOCK=1024)
    return rows
