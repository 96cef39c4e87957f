"""Expert output masking."""

from __future__ import annotations

import torch
from torch import Tensor

from moegen.ops.op import op


def _kept(out: Tensor, rate: float, training: bool, **options: object) -> int:
    """A byte for each place of the mask."""
    return int(out.numel() if options.get("values") else out.shape[0])


@op(effect=True, flops=lambda out, rate, training, **options: 0, extra=_kept)
def mask_outputs(
    out: Tensor,
    rate: float,
    training: bool,
    values: bool = False,
    scale: float = 1.0,
    eval_scale: float = 1.0,
) -> Tensor:
    """out [N, d] with each row, or value, 0 with probability rate in training.

    What is left is multiplied by scale; in evaluation everything by eval_scale.
    """
    if not training:
        return out if eval_scale == 1.0 else out * eval_scale
    shape = out.shape if values else (*out.shape[:-1], 1)
    masked = torch.rand(shape, device=out.device) < rate
    out = out.masked_fill(masked, 0)
    return out if scale == 1.0 else out * scale
