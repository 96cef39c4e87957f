"""Names of the functions that graphs call, as Python code calls them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from moegen.ops.op import op_of


@functools.lru_cache(maxsize=1)
def _torch_names() -> dict[int, str]:
    names = {id(getattr(torch, n)): f"torch.{n}" for n in dir(torch) if not n.startswith("_")}
    return names | {id(getattr(F, n)): f"F.{n}" for n in dir(F) if not n.startswith("_")}


def function_name(target: Any) -> str:
    """How emitted code calls a function: `F.linear`, `torch.cat`, an op or record by its name."""
    known = op_of(target)
    if known:
        return known.name
    if hasattr(target, "_fields"):
        return str(target.__name__)
    return _torch_names()[id(target)]


def is_torch_function(target: Any) -> bool:
    """Whether a function is public in torch or torch.nn.functional."""
    return id(target) in _torch_names()
