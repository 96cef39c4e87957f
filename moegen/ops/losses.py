"""Auxiliary losses and the statistics they are made of; padding counts for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.op import op


@op()
def real_tokens(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Which of ids [B, S] are real, bool [B * S]; all of them if there is no mask."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool).flatten()
    return mask.bool().flatten()


def _kept(values: Tensor, copies: int) -> int:
    """Bytes of so many values a token, and of the number of tokens that a mean divides by."""
    return (copies * values.shape[0] + 1) * values.dtype.itemsize


@op(extra=lambda values, valid: _kept(values, 1))
def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of values [T, ...] over the tokens where valid [T] is true; 0 if there is none."""
    values = values if values.is_floating_point() else values.float()
    kept = valid.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
    return (values * kept).sum(0) / kept.sum().clamp(min=1)


@op()
def choice_fractions(load: Tensor, choices: int) -> Tensor:
    """load [E] as fractions of tokens: they sum to the number of choices a token has."""
    return load / (load.sum() / choices).clamp(min=1)


@op(saves=("fraction",))
def balance_loss(fraction: Tensor, probability: Tensor) -> Tensor:
    """E * sum of fraction * probability [E] (GShard 2020, Switch 2021); gradient by the latter."""
    return fraction.shape[0] * (fraction.detach() * probability).sum()


def _kept_of_sequences(scores: Tensor, _: Tensor, __: Tensor, sequences: int) -> int:
    """Bytes of a sum and a weight a token, length and fractions a sequence, and their number."""
    tokens, experts = scores.shape
    return (2 * tokens + sequences * (1 + experts)) * scores.dtype.itemsize + 8


@op(saves=("scores",), extra=_kept_of_sequences)
def sequence_balance_loss(
    scores: Tensor, experts: Tensor, valid: Tensor, sequences: int
) -> Tensor:
    """Balance inside each sequence, averaged over those not empty (DeepSeek-V3 section 2.1.2).

    scores [T, E], experts [T, k], valid [T]; T = sequences * length. For a sequence: the sum
    over experts of E / k * (share of its tokens that chose e) * (mean normalised score of e).
    """
    share = scores / scores.sum(-1, keepdim=True)
    shape = (sequences, scores.shape[0] // max(sequences, 1))
    real = torch.unflatten(valid, 0, shape).unsqueeze(-1).to(scores.dtype)
    tokens = real.sum(1)
    some = tokens.clamp(min=1)
    probability = (torch.unflatten(share, 0, shape) * real).sum(1) / some
    chosen = torch.zeros_like(scores).scatter(-1, experts, 1.0)
    fraction = (torch.unflatten(chosen, 0, shape) * real).sum(1) / some
    per_sequence = (
        (fraction * probability).sum(-1) * scores.shape[-1] / experts.shape[-1]
    )
    return per_sequence.sum() / (tokens > 0).sum().clamp(min=1)


@op(saves=("logits",), extra=lambda logits, valid: _kept(logits, 2))
def z_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """Mean squared log-partition of logits [T, E] over real tokens (ST-MoE 2022)."""
    return masked_mean(torch.logsumexp(logits, -1).square(), valid)


@op()
def sum_over_layers(routing: Sequence[Any], name: str) -> Tensor:
    """The sum of one auxiliary loss over the routed layers that have it."""
    return torch.stack([r.losses[name] for r in routing if name in r.losses]).sum()


@op()
def mean_over_layers(routing: Sequence[Any], name: str) -> Tensor:
    """The mean of one auxiliary loss over the routed layers that have it."""
    return torch.stack([r.losses[name] for r in routing if name in r.losses]).mean()


@op(extra=lambda routing, choices: 4 * routing[0].probability.numel())
def pooled_balance_loss(routing: Sequence[Any], choices: int) -> Tensor:
    """The balance loss of statistics averaged over layers, as in transformers' models.

    Opposite collapses of two layers cancel in it, which the mean of their losses shows.
    """
    fraction = torch.stack([choice_fractions(r.load, choices) for r in routing]).mean(0)
    probability = torch.stack([r.probability for r in routing]).mean(0)
    return balance_loss(fraction, probability)


def _kept_of_loss(logits: Tensor, _: Tensor) -> int:
    """Bytes of log-probabilities in fp32 and a label for all positions but the last, and a sum."""
    batch, length, words = logits.shape
    return int(batch * (length - 1) * (4 * words + 8) + 4)


@op(extra=_kept_of_loss)
def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, S, V] at labels [B, S], in fp32; label -100 is left out.

    The logits at a position are held against the label of the next one.
    """
    predicted = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=-100)


@op()
def dropped_fraction(kept: Tensor, load: Tensor, nowhere: int) -> Tensor:
    """The fraction of the choices counted in load [E] that are not in kept [T, k]."""
    return 1 - (kept < nowhere).sum() / load.sum().clamp(min=1)


def _output_z(logits: Tensor, valid: Tensor) -> int:
    """Bytes of a log-partition and a weight for each token, and of logits in fp32."""
    copy = 0 if logits.dtype == torch.float32 else logits.numel()
    return int(4 * (copy + 2 * logits.numel() // logits.shape[-1] + 1))


@op(
    saves=lambda logits, valid: ("logits",) if logits.dtype == torch.float32 else (),
    extra=_output_z,
)
def output_z_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """Mean squared log-partition of a model's logits [B, S, V] over real tokens, in fp32."""
    return masked_mean(
        torch.logsumexp(logits.flatten(0, 1).float(), -1).square(), valid
    )
