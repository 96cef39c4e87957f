"""What autograd keeps for backward, counted where torch tells of it.

Plans tell what a GPU keeps. Some of torch's functions keep something else on CPU: rms_norm,
dropout and attention whose values are narrower than its keys are decomposed, and layer_norm has
its statistics in 16 bits. Here these are replaced by stand-ins that keep what torch's fused CUDA
kernels keep; everything else is as it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.graph.execute import tensors


class FusedNorm(torch.autograd.Function):
    """aten::_fused_rms_norm: the input, the scale, and one statistic a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        statistic = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, statistic)
        out = wide * statistic
        out = out if weight is None else out * weight
        return out.to(x.dtype).contiguous()


class FusedLayerNorm(torch.autograd.Function):
    """aten::native_layer_norm: its statistics are in fp32, where a CPU has the input's format."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = wide.mean(-1, keepdim=True), wide.var(-1, keepdim=True)
        ctx.save_for_backward(x, weight, bias, mean, variance)
        return torch.ones_like(x)


class FusedDropout(torch.autograd.Function):
    """aten::native_dropout: a byte a value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = torch.rand_like(x) > p
        ctx.save_for_backward(mask)
        return x * mask / (1 - p)


class FusedAttention(torch.autograd.Function):
    """Flash or memory-efficient attention: inputs, output and one statistic a query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = torch.ones(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
        wide = torch.promote_types(q.dtype, torch.float32)
        ctx.save_for_backward(q, k, v, out, torch.ones(q.shape[:-1], dtype=wide))
        return out


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Torch's functions as CUDA computes them; not while a plan is made."""
    fused = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if q.shape[-1] == v.shape[-1]:
            return fused(q, k, v, **options)
        return FusedAttention.apply(q, k, v, options["scale"])  # type: ignore[no-any-return]

    def norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
        return FusedNorm.apply(x, weight, eps)  # type: ignore[no-any-return]

    def layer_norm(
        x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, **_: Any
    ) -> Tensor:
        return FusedLayerNorm.apply(x, weight, bias)  # type: ignore[no-any-return]

    def drop(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
        return FusedDropout.apply(x, p) if training else x  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        patch.setattr(F, "rms_norm", norm)
        patch.setattr(F, "layer_norm", layer_norm)
        patch.setattr(F, "dropout", drop)
        yield


def kept(run: Callable[[], Any], cuda: bool = True) -> list[Tensor]:
    """Every tensor that `run` keeps for backward; held, so that no address is used twice."""
    found: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        found.append(x)
        return x

    kernels = cuda_kernels() if cuda else nullcontext()
    with kernels, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    assert any(x.requires_grad for x in tensors(result))
    return found


def distinct_bytes(found: Iterable[Tensor], aside: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages behind tensors, but for some tensors'."""
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    for x in aside:
        sizes.pop(x.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def own(model: torch.nn.Module, *inputs: Tensor) -> list[Tensor]:
    return [*model.parameters(), *model.buffers(), *inputs]
