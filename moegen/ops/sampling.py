"""Sampled softmax: a loss over a few words of a large vocabulary, drawn by their rank."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.losses import next_token_loss
from moegen.ops.op import op


def log_uniform_words(count: int, words: int, device: torch.device) -> Tensor:
    """count ids [count], each k with probability ln((k + 2) / (k + 1)) / ln(words + 1).

    So ids are to be in order of frequency, which is then close to Zipf's law.
    """
    drawn = torch.rand(count, device=device, dtype=torch.float64)
    ids = (drawn * math.log(words + 1)).exp().floor().long() - 1
    return ids.clamp(0, words - 1)


def log_expected(ids: Tensor, count: int, words: int) -> Tensor:
    """Logarithm of the probability that each of ids is among count draws, in fp32."""
    rank = ids.double()
    share = ((rank + 2) / (rank + 1)).log() / math.log(words + 1)
    return (-torch.expm1(count * torch.log1p(-share))).log().float()


def _positions(hidden: Any) -> int:
    """Positions with a next token."""
    return int(hidden.shape[0] * (hidden.shape[1] - 1))


def _flops(
    hidden: Any, table: Any, bias: Any, labels: Any, count: int, training: bool
) -> int:
    """Products with the words drawn; those with the labels' own are element by element."""
    words = count if training else table.shape[0]
    return int(2 * _positions(hidden) * hidden.shape[-1] * words)


def _kept(
    hidden: Any, table: Any, bias: Any, labels: Any, count: int, training: bool
) -> int:
    """Bytes of vectors, of the rows looked up, of log-probabilities, and of ids."""
    positions, width = _positions(hidden), hidden.shape[-1]
    rows = (count + 2 * positions) * width * hidden.dtype.itemsize
    logits = 4 * positions * (count + 1)
    return int(rows + logits + 8 * (count + 2 * positions) + positions * count + 4)


@op(flops=_flops, extra=_kept, effect=True)
def sampled_softmax_loss(
    hidden: Tensor,
    table: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    count: int,
    training: bool,
) -> Tensor:
    """Mean cross-entropy of the next token, from vectors [B, S, d] and the head's table [V, d].

    In training over the label and the words among `count` draws, each logit less the logarithm
    of the probability of being drawn (Jean et al. 2015; Jozefowicz et al. 2016); a draw equal
    to the label, or to another draw, counts for nothing. In evaluation over all words. Label
    -100 is left out.
    """
    if not training:
        return next_token_loss(F.linear(hidden, table, bias), labels)
    words = table.shape[0]
    vectors, labels = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    known = labels.clamp(min=0)
    drawn = log_uniform_words(count, words, hidden.device).sort().values
    again = torch.zeros_like(drawn, dtype=torch.bool)
    again[1:] = drawn[1:] == drawn[:-1]
    right = (vectors * F.embedding(known, table)).sum(-1).float()
    others = F.linear(vectors, F.embedding(drawn, table)).float()
    if bias is not None:
        right, others = right + bias[known], others + bias[drawn]
    right = right - log_expected(known, count, words)
    others = others - log_expected(drawn, count, words)
    hit = again | (drawn == known.unsqueeze(-1))
    others = others.masked_fill(hit, float("-inf"))
    logits = torch.cat((right.unsqueeze(-1), others), -1)
    return F.cross_entropy(
        logits, torch.zeros_like(labels).where(labels >= 0, -100), ignore_index=-100
    )
