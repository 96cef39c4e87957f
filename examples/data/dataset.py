"""What every loader gives: rows to learn from, and other rows to be judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT = 5  # one row in so many is kept from training


@dataclass(frozen=True)
class Part:
    """Rows x [N, ...] with what is to be predicted of them, y [N, ...]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        """How many rows."""
        return len(self.x)

    def rows(self, places: Tensor) -> Part:
        """Those at these places [B]."""
        return Part(self.x[places], self.y[places])

    def first(self, count: int) -> Part:
        """At most so many, for quick runs."""
        return Part(self.x[:count], self.y[:count])

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Part]:
        """Batches without end: each pass over the rows in a new order, its remainder left out."""
        size = min(size, len(self))
        while True:
            order = torch.randperm(len(self), generator=generator)
            for start in range(0, len(self) - size + 1, size):
                yield self.rows(order[start : start + size])

    def chunks(self, size: int) -> Iterator[Part]:
        """All rows once, in order; the last chunk may be shorter."""
        for start in range(0, len(self), size):
            yield Part(self.x[start : start + size], self.y[start : start + size])


@dataclass(frozen=True)
class Dataset:
    """Two parts of one table or set of images, and what to say of them.

    features: a name for each column of x, if it is a table. about: a sentence with source and
    licence, for the results' file.
    """

    name: str
    train: Part
    held_out: Part
    about: str
    features: tuple[str, ...] = ()

    def first(self, count: int) -> Dataset:
        """At most so many rows in each part, for quick runs."""
        train, held_out = self.train.first(count), self.held_out.first(count)
        return Dataset(self.name, train, held_out, self.about, self.features)


def is_held_out(contents: Iterable[bytes]) -> Tensor:
    """Which rows are for judging: [N] bool, by their contents, so equal rows are on one side.

    The same rows are held out everywhere, in whatever order they come.
    """
    digests = (hashlib.sha256(content).digest() for content in contents)
    return torch.tensor([int.from_bytes(d[:8], "big") % HELD_OUT == 0 for d in digests])


def divided(x: Tensor, y: Tensor, held_out: Tensor) -> tuple[Part, Part]:
    """Rows for training and rows held out, in a fixed random order: files may be sorted."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, held_out = x[order], y[order], held_out[order]
    return Part(x[~held_out], y[~held_out]), Part(x[held_out], y[held_out])
