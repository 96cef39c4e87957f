"""Pairs of an image and a caption, made of real digits: "a three", "a seven and a one".

A scene is a row of cells, each with a handwritten digit or empty, filled from the left. The
caption names the digits in their order. Scenes held out are made of digits that training never
saw, so whoever knows their captions can read handwriting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.data.dataset import Part
from examples.data.images import CLASSES, digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAD, START, END = 0, 1, 2  # the first ids of words; bytes are 0 to 255, and 256 on are these
WORDS = ("<pad>", "<start>", "<end>", "a", "an", ",", "and", *NAMES)


@dataclass(frozen=True)
class Pairs:
    """Images [N, 1, H, W] and captions of them, ids [N, S] padded on the right.

    lengths: ids that are no padding [N]. content: the digits shown [N, cells], -1 for none; equal
    rows have equal captions, so that a contrastive loss can tell equals from others.
    """

    images: Tensor
    ids: Tensor
    lengths: Tensor
    content: Tensor

    def __len__(self) -> int:
        """How many pairs."""
        return len(self.images)

    @property
    def valid(self) -> Tensor:
        """Which ids are no padding [N, S]."""
        return torch.arange(self.ids.shape[1]) < self.lengths.unsqueeze(-1)

    def rows(self, places: Tensor) -> Pairs:
        """Those at these places."""
        parts = (self.images, self.ids, self.lengths, self.content)
        return Pairs(*(part[places] for part in parts))


@dataclass(frozen=True)
class Captions:
    """Makes pairs of the digits in one part of the data.

    cells: most digits in a scene. tokens: `words` (ids of WORDS) or `bytes` (then 256 + PAD and so
    on are the special ids).
    """

    digits: Part
    cells: int = 3
    tokens: str = "words"

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return len(WORDS) if self.tokens == "words" else 256 + END + 1

    @property
    def length(self) -> int:
        """Ids in a row of captions, the padding included: as many as the longest has."""
        return max(len(self.encode([digit] * self.cells)) for digit in range(CLASSES))

    def encode(self, shown: Sequence[int]) -> list[int]:
        """The ids of the caption of some digits, with start and end."""
        if self.tokens == "words":
            return [START, *map(WORDS.index, caption_words(shown)), END]
        return [256 + START, *caption(shown).encode(), 256 + END]

    def sample(self, count: int, generator: torch.Generator) -> Pairs:
        """Random scenes: first how many digits, then which, each as likely as any other."""
        filled = torch.randint(1, self.cells + 1, (count, 1), generator=generator)
        which = torch.randint(len(self.digits), (count, self.cells), generator=generator)
        return self._pairs(which.where(torch.arange(self.cells) < filled, -1))

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Pairs]:
        """New scenes without end."""
        while True:
            yield self.sample(size, generator)

    def singles(self) -> Pairs:
        """Every digit of this part alone, to be classified by the captions of `classes`."""
        which = torch.full((len(self.digits), self.cells), -1)
        which[:, 0] = torch.arange(len(self.digits))
        return self._pairs(which)

    def classes(self) -> tuple[Tensor, Tensor]:
        """Captions "a zero" to "a nine": ids [10, S] and their lengths [10]."""
        return self._captions([[digit] for digit in range(CLASSES)])

    def _pairs(self, which: Tensor) -> Pairs:
        """Scenes of digits at these places [N, cells], -1 for an empty cell."""
        empty = which < 0
        cells = self.digits.x[which.clamp(min=0)]  # N, cells, 1, H, W
        cells = cells.masked_fill(empty[..., None, None, None], 0)
        images = torch.cat(cells.unbind(1), -1)
        content = self.digits.y[which.clamp(min=0)].masked_fill(empty, -1)
        shown = [[digit for digit in row if digit >= 0] for row in content.tolist()]
        return Pairs(images, *self._captions(shown), content)

    def _captions(self, shown: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        rows = [self.encode(row) for row in shown]
        lengths = torch.tensor([len(row) for row in rows])
        pad = PAD if self.tokens == "words" else 256 + PAD
        padded = [row + [pad] * (self.length - len(row)) for row in rows]
        return torch.tensor(padded), lengths


def captions(cells: int = 3, tokens: str = "words") -> tuple[Captions, Captions]:
    """Makers of pairs from scikit-learn's digits: for training, and from digits held out."""
    found = digits()
    return Captions(found.train, cells, tokens), Captions(found.held_out, cells, tokens)


def caption_words(shown: Sequence[int]) -> list[str]:
    """The words of a caption: an, eight, ",", a, one, and, a, two."""
    words: list[str] = []
    for place, digit in enumerate(shown):
        if place:
            words.append("and" if place == len(shown) - 1 else ",")
        words += ["an" if NAMES[digit] == "eight" else "a", NAMES[digit]]
    return words


def caption(shown: Sequence[int]) -> str:
    """The caption as text: "an eight, a one and a two"."""
    return " ".join(caption_words(shown)).replace(" ,", ",")
