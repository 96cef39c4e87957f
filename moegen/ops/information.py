"""Entropy of routers and information in their choices (LIMoE 2022, Mod-Squad 2023)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.losses import masked_mean
from moegen.ops.op import op


def entropy(probability: Tensor) -> Tensor:
    """-sum p ln p over the last dimension, 0 ln 0 being 0, in nats."""
    positive = torch.where(probability > 0, probability, 1)
    return -(probability * positive.log()).sum(-1)


@op()
def router_entropy(scores: Tensor, valid: Tensor) -> Tensor:
    """Mean entropy of a real token's scores [T, E], brought to sum to one; a statistic."""
    scores = scores.detach()
    tiny = torch.finfo(scores.dtype).tiny
    share = scores / scores.sum(-1, keepdim=True).clamp(min=tiny)
    return masked_mean(entropy(share), valid)


def _kept_of_entropy(scores: Tensor, valid: Tensor) -> int:
    """Bytes of two numbers and a mark a score, and a mark a token."""
    size = scores.dtype.itemsize
    return scores.numel() * (2 * size + 1) + (scores.shape[0] + 1) * size


@op(saves=("scores",), extra=_kept_of_entropy)
def local_entropy(scores: Tensor, valid: Tensor) -> Tensor:
    """Mean entropy of the scores [T, E] of real tokens."""
    return masked_mean(entropy(scores), valid)


def _kept_of_mean(scores: Tensor, valid: Tensor, spread: float | None) -> int:
    """Bytes of a mark a token, and of three numbers and a mark an expert."""
    tokens, experts = scores.shape
    size = scores.dtype.itemsize
    bounded = 0 if spread is None else size + 1
    return (tokens + 3 * experts + 1) * size + experts + bounded


@op(extra=_kept_of_mean)
def global_entropy(scores: Tensor, valid: Tensor, spread: float | None) -> Tensor:
    """Minus the entropy of the mean of scores [T, E]; with spread, max(0, ln spread + that)."""
    value = -entropy(masked_mean(scores, valid))
    if spread is None:
        return value
    # Without a token there is nothing to spread.
    return F.relu(value + math.log(spread)) * valid.any()


def _kept_of_information(gates: Tensor, ids: Tensor, count: int, valid: Tensor) -> int:
    """Bytes of marks, masses, and of three numbers and a mark for each share."""
    size = gates.dtype.itemsize
    tokens, experts = gates.shape
    shares = experts + count + count * experts
    return size * (count * tokens + count * experts + 2) + (3 * size + 1) * shares


@op(
    flops=lambda gates, ids, count, valid: 2 * count * gates.numel(),
    backward=1.0,
    extra=_kept_of_information,
)
def mutual_information(gates: Tensor, ids: Tensor, count: int, valid: Tensor) -> Tensor:
    """-I(id; expert) in nats, from the gates [T, E] of real tokens with ids [T] below count."""
    known = torch.arange(count, device=ids.device).unsqueeze(-1) == ids
    mass = (known & valid).to(gates.dtype) @ gates  # [count, E]
    joint = mass / mass.sum().clamp(min=torch.finfo(gates.dtype).tiny)
    apart = entropy(joint.sum(0)) + entropy(joint.sum(1))
    return entropy(joint.flatten()) - apart
