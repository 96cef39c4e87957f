"""Second choices: skipped by chance or threshold, or drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

from moegen.ops.op import op


@op(
    effect=True,
    flops=lambda experts, weights, policies, threshold, nowhere, training: 0,
)
def skip_choices(
    experts: Tensor,
    weights: Tensor,
    policies: tuple[str, str],
    threshold: float,
    nowhere: int,
    training: bool,
) -> Tensor:
    """experts [T, K], `nowhere` where a choice after the first is skipped, by its weight [T, K].

    policies: in training and in evaluation. random keeps with probability weight / threshold.
    """
    policy = policies[0] if training else policies[1]
    if policy in ("all", "sampling"):
        return experts
    later = weights.detach()[:, 1:]
    if policy == "threshold":
        skipped = later <= threshold
    elif policy == "random":
        skipped = torch.rand_like(later) >= later / threshold
    else:
        skipped = torch.ones_like(later, dtype=torch.bool)
    return torch.cat((experts[:, :1], experts[:, 1:].masked_fill(skipped, nowhere)), -1)


@op(effect=True, flops=lambda ranked, logits, experts, policies, training: 0)
def sample_second(
    ranked: Tensor,
    logits: Tensor,
    experts: Tensor,
    policies: tuple[str, str],
    training: bool,
) -> Tensor:
    """experts [T, 2] with the second drawn by the logits [T, E] among all others that are allowed.

    Where the policy (in training, in evaluation) is another than sampling: as they are.
    """
    if (policies[0] if training else policies[1]) != "sampling":
        return experts
    first = experts[:, :1]
    tiny = torch.finfo(logits.dtype).tiny
    gumbel = -torch.empty_like(logits).exponential_().clamp(min=tiny).log()
    others = (logits.detach() + gumbel).masked_fill(ranked == -torch.inf, -torch.inf)
    second = others.scatter(-1, first, -torch.inf).argmax(-1, keepdim=True)
    return torch.cat((first, second), -1)
