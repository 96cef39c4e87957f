"""How near kernels are to float64, beside plain PyTorch in the same format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOOR = 4  # roundings of float32 that are forgiven where plain PyTorch happens to be exact


def pulled(function: Callable[..., Any], *inputs: Tensor, slopes: Sequence[Tensor]) -> list[Tensor]:
    """The results of floating point, and the gradient of each such input by these slopes."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    found = function(*leaves)
    results = [found] if isinstance(found, Tensor) else list(found)
    results = [x for x in results if x.is_floating_point()]
    total = sum((x * slope.to(x.dtype)).sum() for x, slope in zip(results, slopes, strict=True))
    assert isinstance(total, Tensor)
    wanted = [x for x in leaves if x.requires_grad]
    return [x.detach() for x in results] + list(torch.autograd.grad(total, wanted))


def worst(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max()) if exact.numel() else 0.0


def ratios(
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    *inputs: Tensor,
    slopes: Sequence[Tensor],
) -> list[float]:
    """Errors of results and gradients over those of plain PyTorch; below the floor they are 0."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = pulled(plain, *wide, slopes=[slope.double() for slope in slopes])
    found = pulled(ours, *inputs, slopes=slopes)
    usual = pulled(plain, *inputs, slopes=slopes)
    said = []
    for got, same, true in zip(found, usual, exact, strict=True):
        assert got.dtype == same.dtype
        assert got.shape == same.shape
        size = max(1.0, float(true.abs().max())) if true.numel() else 1.0
        error = worst(got, true)
        least = FLOOR * torch.finfo(torch.float32).eps * size
        said.append(0.0 if error <= least else error / max(worst(same, true), 1e-300))
    return said
