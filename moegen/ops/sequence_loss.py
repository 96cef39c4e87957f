"""The loss of a written sequence, and what a decoder reads while it learns to write it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moegen.ops.op import op


@op()
def shift_right(labels: Tensor, start: int) -> Tensor:
    """labels [B, T] one place later behind a start token; -100 becomes that token too."""
    shifted = labels.new_full(labels.shape, start)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == -100, start)


@op(saves=("labels",), extra=lambda logits, labels: 4 * (logits.numel() + 1))
def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, T, V] at labels [B, T], in fp32; -100 is left out."""
    predicted = logits.flatten(0, 1).float()
    return F.cross_entropy(predicted, labels.flatten(), ignore_index=-100)
