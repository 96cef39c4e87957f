"""One step of a training as one vector on the device, so that many reach the host at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

MODEL = -1  # in place of a layer's index, for what the whole model has
Key = tuple[int, str, str]  # layer, what it is, and its name if it is a loss


@dataclass
class Row:
    """The values of a step, end to end, and how many each key has.

    Values of micro-batches are added up.
    """

    step: int
    sizes: dict[Key, int]
    values: Tensor  # [sum of sizes]
    parts: int = 1  # micro-batches
    on_host: bool = False

    def add(self, other: Row) -> None:
        """Take in another micro-batch of the same step."""
        self.values = other.values + self.values.to(other.values, non_blocking=True)
        self.parts += 1
        self.on_host = False

    def places(self) -> dict[Key, int]:
        """Where the values of each key begin."""
        return dict(zip(self.sizes, accumulate(self.sizes.values(), initial=0), strict=False))


def row(
    step: int,
    routing: Iterable[Any],
    losses: Mapping[str, Tensor | float],
    loss: Tensor | float | None,
) -> Row:
    """Copy all that is known of a step; nothing waits for the device."""
    found: dict[Key, Tensor | float] = {}
    for layer, record in enumerate(routing):
        found[layer, "load", ""] = record.load
        found[layer, "dropped", ""] = record.dropped
        entropy = getattr(record, "entropy", None)
        if entropy is not None:
            found[layer, "router_entropy", ""] = entropy
        for name, value in getattr(record, "losses", {}).items():
            found[layer, "loss", str(name)] = value
    for name, value in losses.items():
        found[MODEL, "loss", str(name)] = value
    if loss is not None:
        found[MODEL, "total", ""] = loss
    return Row(step, *_end_to_end(found))


@torch.no_grad()
def _end_to_end(found: Mapping[Key, Tensor | float]) -> tuple[dict[Key, int], Tensor]:
    """One vector of all values, and how many each key has."""
    tensors = [value for value in found.values() if isinstance(value, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    # Loads are exact in fp64 up to 2^53; Apple's GPUs have fp32 alone.
    wide = torch.float32 if device.type == "mps" else torch.float64
    # Values of one dtype are put together before they are converted: a few kernels, not hundreds.
    groups: dict[torch.dtype, dict[Key, Tensor]] = {}
    for key, value in found.items():
        if isinstance(value, Tensor):
            part = value.reshape(-1).to(device)
        else:
            part = torch.full((1,), value, dtype=wide, device=device)
        groups.setdefault(part.dtype, {})[key] = part
    sizes = {key: part.numel() for group in groups.values() for key, part in group.items()}
    parts = [torch.cat(list(group.values())).to(wide) for group in groups.values()]
    return sizes, torch.cat([torch.empty(0, dtype=wide, device=device), *parts])


def to_host(rows: Sequence[Row]) -> None:
    """Move what still is on the device in one transfer."""
    waiting = [row for row in rows if not row.on_host]
    if not waiting:
        return
    host = torch.cat([row.values for row in waiting]).cpu().double()
    parts = torch.split(host, [len(row.values) for row in waiting])
    for row, values in zip(waiting, parts, strict=True):
        row.values = values.clone()  # a view would keep the steps that are dropped later
        row.on_host = True
