"""Registers functions that launch kernels as ops of torch, which compile takes whole."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def define(
    module: str,
    name: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """The op `name`, in a namespace of the file's own: module is its __name__.

    launch computes on real tensors, fake gives empty results of the same shapes; save(ctx, inputs,
    output) and backward(ctx, *grads) make it differentiable. A file that is imported twice under
    one name finds the ops of the first time.
    """
    space = module.replace(".", "_")
    if not hasattr(getattr(torch.ops, space), name):
        definition = torch.library.custom_op(
            f"{space}::{name}", _on_its_device(launch), mutates_args=()
        )
        definition.register_fake(fake)
        if backward is not None:
            definition.register_autograd(backward, setup_context=save)
    return getattr(getattr(torch.ops, space), name)


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels start on the current GPU, so the tensors' own must be that."""

    @functools.wraps(launch)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.cuda.device_of(first):  # nothing, for tensors of the CPU
            return launch(*args, **kwargs)

    return guarded
