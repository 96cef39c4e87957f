"""Real text that every machine has: the sources of Python's own standard library, as bytes."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BYTES = 256
MOST = 16_000_000  # bytes of text that are read
HELD_OUT = 10  # one file in so many is kept from training
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from, and bytes of other files to be judged by."""

    train: Tensor
    held_out: Tensor
    files: int

    def batch(self, sequences: int, length: int, generator: torch.Generator) -> Tensor:
        """Sequences [B, S] from random places of the training text."""
        starts = torch.randint(len(self.train) - length + 1, (sequences, 1), generator=generator)
        return self.train[starts + torch.arange(length)].long()

    def examination(self, sequences: int, length: int) -> Tensor:
        """Sequences [B, S] from evenly spaced places of the text held out; always the same."""
        starts = torch.linspace(0, len(self.held_out) - length, sequences).long()
        return self.held_out[starts.unsqueeze(-1) + torch.arange(length)].long()

    def unigram_loss(self, ids: Tensor) -> float:
        """Nats a byte that knowing the frequencies of bytes alone costs on sequences [B, S].

        The first byte of each sequence is left out, as it is for a model that predicts the next.
        """
        counts = torch.bincount(self.train.long(), minlength=BYTES).double() + 1
        cost = math.log(counts.sum().item()) - counts.log()
        return cost[ids[:, 1:]].mean().item()


def standard_library(most: int = MOST) -> Corpus:
    """Python's own sources without its tests, split by file: a whole file is on one side."""
    root = Path(sysconfig.get_path("stdlib"))
    train, held_out, files = bytearray(), bytearray(), 0
    for path in sources(root):
        text = path.read_bytes()
        if len(train) + len(held_out) + len(text) > most:
            break
        (held_out if is_held_out(path.relative_to(root)) else train).extend(text)
        files += 1
    return Corpus(_tensor(train), _tensor(held_out), files)


def sources(root: Path) -> Iterator[Path]:
    """The .py files below a folder in the order of their names, tests and packages left out."""
    found = (path for path in root.rglob("*.py") if path.is_file())
    return iter(sorted(path for path in found if not _LEFT_OUT & set(path.relative_to(root).parts)))


def is_held_out(name: Path) -> bool:
    """Whether a file is for judging: the same files everywhere, whatever else is installed."""
    digest = hashlib.sha256(name.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT == 0


def _tensor(text: bytearray) -> Tensor:
    return torch.frombuffer(text, dtype=torch.uint8)
