"""What routers measure tokens and experts with."""

from __future__ import annotations

import torch
from torch import Tensor

from moegen.ops.op import op


def _kept_of_unit(x: Tensor, eps: float = 0.0) -> int:
    """Bytes of a length a vector, and a mark where none is added to it."""
    return x.numel() // max(x.shape[-1], 1) * (x.dtype.itemsize + (0 if eps else 1))


@op(saves=("x",), extra=_kept_of_unit)
def unit(x: Tensor, eps: float = 0.0) -> Tensor:
    """x [..., d] divided by its length; a vector of zeros stays as it is."""
    squared = x.square().sum(-1, keepdim=True)
    if eps:
        return x * (squared + eps).rsqrt()
    # Where the length is 0 the gradient of its root is not finite, so take that of 1.
    return x * torch.where(squared > 0, squared, 1).rsqrt()


@op(
    flops=lambda x, means, squared: 2 * x.shape[0] * x.shape[1] * means.shape[0],
    saves=("x", "means"),
    extra=lambda x, means, squared: (
        x.shape[0]
        * means.shape[0]
        * (x.dtype.itemsize if squared else 2 * x.dtype.itemsize + 1)
    ),
)
def distances(x: Tensor, means: Tensor, squared: bool) -> Tensor:
    """Euclidean distances of x [T, d] and means [E, d] -> [T, E]; squared if asked."""
    product = x @ means.t()
    square = x.square().sum(-1, keepdim=True) - 2 * product + means.square().sum(-1)
    square = square.clamp(min=0)
    if squared:
        return square
    # Where a token is a mean the root has no gradient, so take that of 1.
    apart = square > 0
    return torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)


@op()
def table_logits(experts: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Experts [T] as logits [T, E]: 0 for a token's own, minus infinity for the others."""
    logits = torch.full(
        (experts.shape[0], num_experts), -torch.inf, dtype=dtype, device=experts.device
    )
    return logits.scatter(-1, experts.unsqueeze(-1), 0)


@op()
def partition(sizes: tuple[int, ...]) -> Tensor:
    """Which experts each part owns, bool [parts, E]: the first its first so many, and so on."""
    owner = [part for part, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor(owner) == torch.arange(len(sizes)).unsqueeze(-1)
