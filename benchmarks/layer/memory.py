"""Bytes that the backward pass keeps, and the most that a pass holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.layer.inputs import Inputs
from benchmarks.layer.shapes import Workload


@dataclass(frozen=True)
class Kept:
    """Bytes of storages kept for backward, parameters left out: of routing data, and others."""

    activations: int
    routing: int


class _Storages:
    """Unique storages, parameters' left out; those of one number a choice at most are routing."""

    def __init__(self, inputs: Inputs, work: Workload) -> None:
        self.left_out = {p.untyped_storage().data_ptr() for p in (inputs.up, inputs.down)}
        self.rows = work.rows
        self.found: dict[int, tuple[int, bool]] = {}
        self.held: list[Tensor] = []  # so that no storage is freed and its address used again

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.left_out and storage.nbytes():
            routing = not tensor.is_floating_point() or tensor.numel() <= self.rows
            self.found[key] = (storage.nbytes(), routing and self.found.get(key, (0, True))[1])
            self.held.append(tensor)
        return tensor

    def sum(self) -> Kept:
        routing = sum(size for size, is_routing in self.found.values() if is_routing)
        return Kept(sum(size for size, _ in self.found.values()) - routing, routing)


def kept_by_hooks(forward: Callable[[], Tensor], inputs: Inputs, work: Workload) -> Kept:
    """What autograd saves during a forward pass, as it says itself."""
    storages = _Storages(inputs, work)
    with torch.autograd.graph.saved_tensors_hooks(storages.add, lambda tensor: tensor):
        out = forward()
    del out
    return storages.sum()


def kept_by_graph(forward: Callable[[], Tensor], inputs: Inputs, work: Workload) -> Kept:
    """What the nodes of the graph of a pass hold: for compiled ones, which are Python's nodes."""
    storages = _Storages(inputs, work)
    out = forward()
    nodes: list[Any] = [out.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for tensor in getattr(node, "saved_tensors", ()):
            if isinstance(tensor, Tensor):
                storages.add(tensor)
    return storages.sum()


def peak(step: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that a step holds beyond what was held before, where the device counts."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    made = step()
    torch.cuda.synchronize(device)
    most = torch.cuda.max_memory_allocated(device) - before
    del made
    return most
