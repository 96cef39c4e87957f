"""Data of two papers that are made, not measured: MMoE's pair of tasks, and Chen's patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.data.dataset import Dataset, Part


def task_weights(u1: Tensor, u2: Tensor, scale: float, correlation: float) -> tuple[Tensor, Tensor]:
    """Weights of two tasks whose cosine is the correlation: w1 = c u1, w2 = c (p u1 + √(1-p²) u2).

    u1, u2: orthonormal [D]. Ma et al. 2018, equations 2 and 3.
    """
    across = math.sqrt(1 - correlation**2)
    return scale * u1, scale * (correlation * u1 + across * u2)


def task_label(x: Tensor, weights: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """What a task asks of rows x [..., D], without noise: w·x + Σ sin(α w·x + β)  [...]."""
    projected = x @ weights
    waves = torch.sin(alpha * projected.unsqueeze(-1) + beta)
    return projected + waves.sum(-1)


def task_pair(
    correlation: float,
    *,
    train: int = 10_000,
    held_out: int = 2_000,
    features: int = 100,
    scale: float = 1.0,
    waves: int = 5,
    noise: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Two regressions y [N, 2] on x [N, features] ~ N(0, 1), whose weights have this cosine.

    Both tasks share α and β, so they are one task if the correlation is 1 (Ma et al. 2018, 3.3).
    Directions, α and β follow from the seed alone and not from the correlation.
    """
    draw = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(features, 2, generator=draw))
    alpha = torch.arange(1, waves + 1) + torch.rand(waves, generator=draw)
    beta = 2 * math.pi * torch.rand(waves, generator=draw)
    x = torch.randn(train + held_out, features, generator=draw)
    both = task_weights(basis[:, 0], basis[:, 1], scale, correlation)
    clean = torch.stack([task_label(x, w, alpha, beta) for w in both], -1)
    y = clean + noise * torch.randn(clean.shape, generator=draw)
    y = (y - y[:train].mean(0)) / y[:train].std(0, correction=0)
    about = f"the synthetic pair of tasks of Ma et al. 2018, correlation {correlation}"
    return Dataset("task_pair", Part(x[:train], y[:train]), Part(x[train:], y[train:]), about)


@dataclass(frozen=True)
class Patches:
    """Chen et al. 2022: x [N, P, D], labels y [N] of -1 and 1, and each row's cluster [N]."""

    x: Tensor
    y: Tensor
    cluster: Tensor

    def __len__(self) -> int:
        """How many rows."""
        return len(self.x)

    def part(self) -> Part:
        """Rows and labels, without the clusters, which no model may see."""
        return Part(self.x, self.y)


def clustered_patches(
    count: int = 16_000,
    *,
    clusters: int = 4,
    patches: int = 4,
    features: int = 50,
    noise: float = 1.0,
    scale: float = 10.0,
    seed: int = 0,
) -> tuple[Patches, Patches]:
    """Rows of a mixture of classifications, for training and (as many) held out.

    Of the patches of a row, in random order, one has the feature of its cluster, signed by the
    label: α y v_k; one the centre of the cluster: β c_k; one misleads with another cluster's
    feature and a random sign: γ ε v_k'. The rest is noise with deviation noise / √features. α is
    in [0.5, 2], β in [1, 2], γ in [0.5, 3], each uniform. Everything is multiplied by scale.
    """
    draw = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(features, 2 * clusters, generator=draw))
    signals, centres = basis.T[:clusters], basis.T[clusters:]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=draw)

    def signs() -> Tensor:
        return 2 * torch.randint(2, (count,), generator=draw) - 1

    def made() -> Patches:
        cluster = torch.randint(clusters, (count,), generator=draw)
        other = (cluster + torch.randint(1, clusters, (count,), generator=draw)) % clusters
        y = signs()
        x = torch.randn(count, patches, features, generator=draw) * noise / math.sqrt(features)
        x[:, 0] = uniform(0.5, 2) * y.unsqueeze(-1) * signals[cluster]
        x[:, 1] = uniform(1, 2) * centres[cluster]
        x[:, 2] = uniform(0.5, 3) * signs().unsqueeze(-1) * signals[other]
        order = torch.rand(count, patches, generator=draw).argsort(-1)
        x = x.gather(1, order.unsqueeze(-1).expand_as(x))
        return Patches(scale * x, y, cluster)

    return made(), made()
