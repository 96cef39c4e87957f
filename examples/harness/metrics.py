"""Measures on rows held out, and the way to take them of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.data.dataset import Part


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; the mode is put back afterwards."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def predicted(model: nn.Module, part: Part, of: Callable[[Any], Tensor], at_once: int) -> Tensor:
    """What a model predicts for all rows [N, ...]; of: the prediction in the model's output."""
    with evaluating(model):
        return torch.cat([of(model(chunk.x)) for chunk in part.chunks(at_once)])


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of scores [N] for labels [N] of 0 and 1; ties count half.

    The chance that a random positive row is ranked above a random negative one; NaN if there is
    no row of either sort.
    """
    values, place = torch.unique(scores.double(), return_inverse=True)
    positive = labels.double() > 0.5
    hits = torch.bincount(place[positive], minlength=len(values)).double()
    misses = torch.bincount(place[~positive], minlength=len(values)).double()
    below = misses.cumsum(0) - misses
    pairs = hits.sum() * misses.sum()
    return float((hits * (below + misses / 2)).sum() / pairs) if pairs else math.nan


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows [N] whose largest of the logits [N, C] is the label."""
    return (logits.argmax(-1) == labels).double().mean().item()


def nats(logits: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy of logits [N, C] and labels [N], in nats a row."""
    return F.cross_entropy(logits.double(), labels).item()


def r2(predictions: Tensor, y: Tensor) -> float:
    """Share of the variance of y [N] that predictions [N] explain; below 0, the mean is better."""
    y, predictions = y.double(), predictions.double()
    return 1 - float((y - predictions).square().mean() / y.var(correction=0))


def gaussian_nats(mean: Tensor, variance: Tensor, y: Tensor) -> float:
    """Mean negative log-density of y [N] under normal distributions, in nats a row."""
    spread = variance.double()
    off = (y.double() - mean.double()).square() / spread
    return float((off + spread.log() + math.log(2 * math.pi)).mean() / 2)


def dispatch_entropy(counts: Tensor) -> float:
    """How mixed the clusters are that experts are given, in nats: counts [E, K] of rows.

    The entropy of an expert's clusters, averaged with the experts' loads as weights: 0 if every
    expert has one cluster, ln K if all have all of them alike (Chen et al. 2022).
    """
    counts = counts.double()
    loads = counts.sum(-1, keepdim=True)
    shares = counts / loads.clamp(min=1)
    entropies = torch.special.entr(shares).sum(-1)
    return float((entropies * loads.squeeze(-1) / loads.sum()).sum())


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; 0 of one value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
