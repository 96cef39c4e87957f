"""Training of an emitted model: optimizer, schedule, and one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moegen.observe import Recorder

DECAY = 0.1
BETAS = (0.9, 0.95)
CLIP = 1.0
WARM_UP = 0.03  # of all steps
FLOOR = 0.05  # of the peak learning rate, at the end


@dataclass(frozen=True)
class Step:
    """What one step did: loss in nats a byte, auxiliary losses, gradient norm."""

    loss: float
    auxiliary: Mapping[str, float]
    norm: float


def optimizer(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices that multiply, and on nothing else.

    Decay pulls towards zero what has a scale of its own: norms and biases, the rows of the
    embedding (most are rare, and would fade between uses), and the router.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        matrix = parameter.ndim > 1 and last not in ("embedding", "router")
        (decayed if matrix else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)


def share_of_rate(done: float) -> float:
    """Linear warm-up, then half a cosine; `done` is the fraction of the training behind us."""
    if done < WARM_UP:
        return (done + 1e-3) / (WARM_UP + 1e-3)
    turned = (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP)))) / 2
    return FLOOR + (1 - FLOOR) * turned


def train_step(
    model: Any,
    adam: torch.optim.Optimizer,
    ids: Tensor,
    rate: float,
    recorder: Recorder,
    number: int,
) -> Step:
    """Step `number` on sequences ids [B, S] at a learning rate; its routing is recorded."""
    for group in adam.param_groups:
        group["lr"] = rate
    total, output = model.training_loss(ids)
    adam.zero_grad(set_to_none=True)
    total.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    adam.step()
    if hasattr(model, "update_balance"):
        model.update_balance(output.routing)  # the bias of busy experts falls, of idle ones rises
    recorder.record(number, output.routing, losses=output.losses, loss=total)
    auxiliary = {name: value.item() for name, value in output.losses.items()}
    return Step(total.item() - sum(auxiliary.values()), auxiliary, float(norm))


@torch.no_grad()
def held_out_loss(model: Any, ids: Tensor, at_once: int = 16) -> float:
    """Nats a byte on sequences [B, S] in evaluation mode, auxiliary losses left out."""
    model.eval()
    parts = torch.split(ids, at_once)
    losses = [float(model.loss(model(part).logits, part)) * len(part) for part in parts]
    model.train()
    return sum(losses) / len(ids)
