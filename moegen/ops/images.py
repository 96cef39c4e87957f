"""Places of patches in an image, and the loss of a classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.op import op


@op()
def patch_positions(
    rows: int, columns: int, width: int, before: int = 0, base: float = 10000.0
) -> Tensor:
    """Sines and cosines of each patch's place -> [before + rows * columns, width].

    In quarters: sine and cosine of the row, then of the column, at width / 4 frequencies
    from 1 down to nearly 1 / base (He et al. 2022, arXiv:2111.06377). `before` rows of
    zeros come first, for tokens that have no place.
    """
    quarter = width // 4
    exponents = torch.arange(quarter, dtype=torch.float64) / quarter
    frequencies = base**-exponents
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)
    angles = [place.unsqueeze(-1) * frequencies for place in (row, column)]
    waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
    places = torch.cat(waves, 1).float()
    return torch.cat((places.new_zeros(before, width), places))


def _kept_of_classes(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> int:
    """Bytes of log-probabilities in fp32 and of a sum; smoothing marks and counts labels."""
    return 4 * logits.numel() + 4 + (labels.numel() + 8 if smoothing else 0)


@op(saves=("labels",), extra=_kept_of_classes)
def class_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits [B, C] at labels [B], in fp32; label -100 is left out.

    smoothing: the share of a label that is spread over all classes.
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
