"""Experts' networks on a CPU, a few experts at a time, so that their rows stay in its caches.

Python reads here how many rows an expert has; what is traced goes by the grouped products of
experts.py instead. Rows are those of feed_forward.py.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moegen.ops.experts import _spans

# Rows of a block, unless one expert has more: few for a cache, many for a call.
_BLOCK = 128


class _Layer(NamedTuple):
    """Experts and what they work on: the activation takes two halves if up has rows for both.

    owner [N] is the token of each row, None where tokens are the rows; share [N, 1] what a row has
    of its token's gradient, None for all of it.
    """

    activation: Callable[..., Tensor]
    tokens: Tensor
    owner: Tensor | None
    share: Tensor | None
    ends: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None

    @property
    def num_rows(self) -> int:
        return (self.tokens if self.owner is None else self.owner).shape[0]

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[1:]

    def halves(self, hidden: Tensor) -> tuple[Tensor, ...]:
        gated = self.up.shape[1] != self.down.shape[2]
        return hidden.chunk(2, -1) if gated else (hidden,)


def _in_memory(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors of a CPU, with values that may be read: nothing is traced."""
    return not torch.compiler.is_compiling() and all(
        x is None
        or (x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter))
        for x in tensors
    )


def _row_blocks(ends: Tensor) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Rows of consecutive experts, and among these the rows of each expert that has any."""
    start = 0
    inside: list[tuple[int, slice]] = []
    for expert, (first, end) in enumerate(_spans(ends)):
        if first < end:
            inside.append((expert, slice(first - start, end - start)))
        last = expert == ends.shape[0] - 1
        if inside and (last or end - start >= _BLOCK):
            yield slice(start, end), inside
            start, inside = end, []


def _room(like: Tensor, ends: Tensor) -> Tensor:
    """Memory for a parameter's gradient [E, ...], with zeros where an expert has no rows."""
    out = like.new_empty(like.shape)
    for matrix, (first, end) in zip(out, _spans(ends), strict=True):
        if first == end:
            matrix.zero_()
    return out


def _without_tail(rows: Tensor, ends: Tensor) -> Tensor:
    """Rows [N, d], with zeros in place for those of no expert."""
    rows[int(ends[-1]) :].zero_()
    return rows


def _multiply(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inside: list[tuple[int, slice]],
    out: Tensor,
) -> Tensor:
    """Rows [B, d] of a block times their experts' weight [E, n, d], into out [B, n]."""
    for expert, own in inside:
        matrix = weight[expert].t()
        if bias is None:
            torch.mm(rows[own], matrix, out=out[own])
        else:
            torch.addmm(bias[expert], rows[own], matrix, out=out[own])
    return out


def _outer(
    left: Tensor, right: Tensor, inside: list[tuple[int, slice]], out: Tensor | None
) -> None:
    """left [B, n] transposed times right [B, d] within each expert, into out [E, n, d] if given.

    For a right side of one column, as sums by row have it, out is [E, n].
    """
    if out is None:
        return
    for expert, own in inside:
        torch.mm(left[own].t(), right[own], out=out[expert].view(-1, right.shape[1]))


def _take(tokens: Tensor, owner: Tensor | None, block: slice) -> Tensor:
    return tokens[block] if owner is None else tokens.index_select(0, owner[block])


def _first_product(
    layer: _Layer, rows: Tensor, inside: list[tuple[int, slice]], out: Tensor | None
) -> Tensor:
    if out is None:
        out = rows.new_empty(rows.shape[0], layer.up.shape[1])
    return _multiply(rows, layer.up, layer.up_bias, inside, out)


def _outputs_on_cpu(layer: _Layer, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The output of every row [N, d], and the first product [N, 2n] if it is to be kept."""
    tokens, ends = layer.tokens, layer.ends
    out = tokens.new_empty(layer.num_rows, layer.down.shape[1])
    kept = tokens.new_empty(layer.num_rows, layer.up.shape[1]) if keep else None
    for block, inside in _row_blocks(ends):
        rows = _take(tokens, layer.owner, block)
        room = None if kept is None else kept[block]
        wide = _first_product(layer, rows, inside, room)
        active = layer.activation(*layer.halves(wide))
        _multiply(active, layer.down, layer.down_bias, inside, out[block])
    return _without_tail(out, ends), kept if kept is None else _without_tail(kept, ends)


def _gradients_on_cpu(
    layer: _Layer, hidden: Tensor | None, grad: Tensor, wanted: list[str]
) -> dict[str, Tensor]:
    """Gradients by name: of parameters, and row by row of tokens [N, d] and weights [N].

    hidden [N, 2n] is the first product if it was kept, grad the gradient of tokens' outputs.
    """
    found = _rooms(layer, grad, wanted)
    for block, inside in _row_blocks(layer.ends):
        rows = _take(layer.tokens, layer.owner, block)
        pulled = _take(grad, layer.owner, block)
        wide = None if hidden is None else hidden[block]
        if wide is None:
            wide = _first_product(layer, rows, inside, None)
        leaf = wide.detach().requires_grad_()
        with torch.enable_grad():
            active = layer.activation(*layer.halves(leaf))
        back = _multiply(pulled, layer.down.mT, None, inside, torch.empty_like(active))
        if "weights" in found:
            found["weights"][block] = _dots(layer, back, active, pulled, inside)
        part = pulled.new_ones(pulled.shape[0], 1)
        scaled = active.detach()
        if layer.share is not None:
            part = layer.share[block]
            back, scaled = back.mul_(part), scaled * part
        _outer(pulled, scaled, inside, found.get("down"))
        _outer(pulled, part, inside, found.get("down_bias"))
        if found.keys() & {"up", "up_bias", "tokens"}:
            if active.requires_grad:
                (back,) = torch.autograd.grad(active, leaf, back)
            else:  # a step, which has no slope
                back = torch.zeros_like(wide)
            _outer(back, rows, inside, found.get("up"))
            _outer(back, back.new_ones(back.shape[0], 1), inside, found.get("up_bias"))
        if "tokens" in found:
            _multiply(back, layer.up.mT, None, inside, found["tokens"][block])
    for name in found.keys() & {"tokens", "weights"}:
        _without_tail(found[name], layer.ends)
    return found


def _rooms(layer: _Layer, grad: Tensor, wanted: list[str]) -> dict[str, Tensor]:
    """Memory for the gradients that are wanted."""
    found = {}
    for name in wanted:
        if name == "tokens":
            found[name] = grad.new_empty(layer.num_rows, layer.up.shape[2])
        elif name == "weights":
            wide = torch.promote_types(grad.dtype, torch.float32)
            found[name] = grad.new_empty(layer.num_rows, dtype=wide)
        else:
            found[name] = _room(getattr(layer, name), layer.ends)
    return found


def _dots(
    layer: _Layer,
    back: Tensor,
    active: Tensor,
    pulled: Tensor,
    inside: list[tuple[int, slice]],
) -> Tensor:
    """Of each row of a block, its output's product with the gradient of its token -> [B]."""
    wide = torch.promote_types(back.dtype, torch.float32)
    of_row = (back * active.detach()).sum(-1, dtype=wide)
    if layer.down_bias is not None:
        for expert, own in inside:
            of_row[own] += (pulled[own] * layer.down_bias[expert]).sum(-1, dtype=wide)
    return of_row
