"""What goes by sequence or by group of tokens: ids, means, softmaxes."""

from __future__ import annotations

import torch
from torch import Tensor

from moegen.ops.op import op


@op(flops=lambda ids, batch, length: 0)
def per_token(ids: Tensor, batch: int, length: int) -> Tensor:
    """Ids of sequences [B] or of tokens [B, S], one for every token -> [B * S]."""
    return ids.view(batch, -1).expand(batch, length).flatten()


def in_groups(values: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """values [T, ...] as [G, size, ...]: runs of tokens, the last one filled up."""
    groups = -(-values.shape[0] // max(size, 1))
    missing = groups * size - values.shape[0]
    filled = values
    if missing:
        rest = values.new_full((missing, *values.shape[1:]), fill)
        filled = torch.cat((values, rest))
    return torch.unflatten(filled, 0, (groups, size))


def _kept_of_means(tokens: Tensor, valid: Tensor | None, batch: int) -> int:
    """Bytes of a mark a token and a length a sequence."""
    if valid is None:
        return 0
    return (tokens.shape[0] + batch) * tokens.dtype.itemsize


@op(extra=_kept_of_means)
def sequence_mean(tokens: Tensor, valid: Tensor | None, batch: int) -> Tensor:
    """Every token [T, d] replaced by the mean of its sequence's real ones; 0 if it has none."""
    length = tokens.shape[0] // max(batch, 1)
    rows = torch.unflatten(tokens, 0, (batch, length))
    if valid is None:
        mean = rows.mean(1, keepdim=True)
    else:
        real = valid.view(batch, length, 1).to(tokens.dtype)
        mean = (rows * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(
            min=1
        )
    return mean.expand(-1, length, -1).flatten(0, 1)


def _kept_of_softmax(logits: Tensor, valid: Tensor | None, group: int | None) -> int:
    """Bytes of the softmax before padding is put to 0, and of a mark a token."""
    rows = logits.shape[0] if group is None else -(-logits.shape[0] // group) * group
    kept = rows * logits.shape[1] * logits.dtype.itemsize
    return kept + (0 if valid is None else logits.shape[0])


@op(extra=_kept_of_softmax)
def softmax_over_tokens(
    logits: Tensor, valid: Tensor | None, group: int | None
) -> Tensor:
    """softmax of logits [T, E] over the real tokens of each group of so many; 0 at padding."""
    padding = None if valid is None else ~valid.unsqueeze(-1)
    if padding is not None:
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
    rows = (
        logits.unsqueeze(0) if group is None else in_groups(logits, group, -torch.inf)
    )
    scores = rows.softmax(1).flatten(0, 1)[: logits.shape[0]]
    return scores if padding is None else scores.masked_fill(padding, 0)
