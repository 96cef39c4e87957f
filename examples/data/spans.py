"""Span corruption over bytes, the task that T5 and Switch learn (Raffel et al. 2020, 3.1.4).

Runs of bytes are left out, each replaced by a sentinel of its own; what is to be written is every
sentinel followed by the bytes that it stands for, then the end. As many bytes are left out of
every sequence, in as many runs, so all inputs have one length, all targets another: no padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAD, END, FIRST_BYTE = 0, 1, 2  # ids; bytes follow, and sentinels follow them
FIRST_SENTINEL = FIRST_BYTE + 256


@dataclass(frozen=True)
class Corrupted:
    """Sequences for an encoder [B, S_in], and what its decoder is to write [B, S_out]."""

    inputs: Tensor
    targets: Tensor

    @property
    def decoder_inputs(self) -> Tensor:
        """The targets one place later, behind the padding id, as T5 starts them."""
        return torch.nn.functional.pad(self.targets[:, :-1], (1, 0), value=PAD)


@dataclass(frozen=True)
class SpanCorruption:
    """Leaves out a share of each sequence, in runs of so many bytes on average.

    T5 leaves out 15% in runs of 3 tokens; a byte is about a third of a token, so runs are longer
    here.
    """

    length: int = 128
    share: float = 0.15
    mean_span: float = 6.0

    @property
    def left_out(self) -> int:
        """Bytes left out of a sequence."""
        return min(max(round(self.length * self.share), 1), self.length - 1)

    @property
    def spans(self) -> int:
        """Runs in a sequence: at least one, and with a byte before each."""
        kept = self.length - self.left_out
        return max(min(round(self.left_out / self.mean_span), self.left_out, kept), 1)

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return FIRST_SENTINEL + self.spans

    @property
    def input_length(self) -> int:
        """Of the encoder: what is kept, a sentinel a run, the end."""
        return self.length - self.left_out + self.spans + 1

    @property
    def target_length(self) -> int:
        """Of the decoder: what is left out, a sentinel a run, the end."""
        return self.left_out + self.spans + 1

    def corrupt(self, text: Tensor, generator: torch.Generator) -> Corrupted:
        """Sequences of bytes [B, length] with random runs left out."""
        batch = len(text)
        kept = _parts(batch, self.length - self.left_out, self.spans, generator)
        gone = _parts(batch, self.left_out, self.spans, generator)
        inputs, targets = [], []
        marks = torch.arange(FIRST_SENTINEL, FIRST_SENTINEL + self.spans).unsqueeze(-1).unbind()
        for row, keep, leave in zip(text + FIRST_BYTE, kept.tolist(), gone.tolist(), strict=True):
            sizes = [size for pair in zip(keep, leave, strict=True) for size in pair]
            runs = torch.split(row, sizes)
            inputs.append(_woven(runs[0::2], marks))
            targets.append(_woven(marks, runs[1::2]))
        return Corrupted(torch.stack(inputs), torch.stack(targets))


def _parts(batch: int, total: int, parts: int, generator: torch.Generator) -> Tensor:
    """Random positive sizes [batch, parts] that sum to total, every division equally likely."""
    order = torch.rand(batch, total - 1, generator=generator).argsort(-1)
    cuts = (order[:, : parts - 1] + 1).sort(-1).values
    first, last = torch.zeros(batch, 1).long(), torch.full((batch, 1), total)
    return torch.cat([first, cuts, last], -1).diff(dim=-1)


def _woven(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> Tensor:
    """One of each in turn, then the end."""
    pieces = [piece for pair in zip(one, other, strict=True) for piece in pair]
    return torch.cat([*pieces, torch.tensor([END])])
