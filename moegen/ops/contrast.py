"""Vectors of two sides compared: unit vectors, means over real tokens, and InfoNCE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.op import op


def _kept_of_norms(x: Tensor) -> int:
    """Bytes of two norms a row, and of fp32 values where x is in another format."""
    rows = x.numel() // x.shape[-1]
    return 8 * rows + (0 if x.dtype == torch.float32 else 4 * x.numel())


@op(
    saves=lambda x: ("x",) if x.dtype == torch.float32 else (),
    extra=_kept_of_norms,
)
def unit_vectors(x: Tensor) -> Tensor:
    """Rows of x [..., d] as vectors of length 1, in fp32."""
    return F.normalize(x.float(), dim=-1)


def _kept_of_contrast(logits: Tensor) -> int:
    """Bytes of log-probabilities in fp32 both ways, of labels, and of two sums."""
    return 8 * logits.numel() + 8 * logits.shape[0] + 8


@op(extra=_kept_of_contrast)
def contrastive_loss(logits: Tensor) -> Tensor:
    """InfoNCE of logits [B, B], row i and column i being a pair: the mean of both ways."""
    logits = logits.float()
    pairs = torch.arange(logits.shape[0], device=logits.device)
    rows = F.cross_entropy(logits, pairs)
    return (rows + F.cross_entropy(logits.T, pairs)) / 2
