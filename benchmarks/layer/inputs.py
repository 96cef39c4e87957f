"""What every variant is given: shared leaf weights, and several copies of everything else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.layer.shapes import Workload

MOST_COPIES = 8


@dataclass
class Batch:
    """One copy of what changes from step to step; tokens, weights and logits are leaves.

    x and grad [T, d], logits [T, E], experts [T, K] int64 and experts32 the same in int32,
    weights [T, K] in the format of x.
    """

    x: Tensor
    grad: Tensor
    logits: Tensor
    experts: Tensor
    experts32: Tensor
    weights: Tensor

    def leaves(self) -> tuple[Tensor, ...]:
        """What gets gradients here."""
        return self.x, self.weights, self.logits


@dataclass
class Inputs:
    """The weights up [E, 2n, d], gate rows first, and down [E, d, n], and copies of a batch."""

    up: nn.Parameter
    down: nn.Parameter
    batches: list[Batch]

    def clear(self) -> None:
        """Forget gradients, so that the next ones are written and not added."""
        self.up.grad = self.down.grad = None
        for batch in self.batches:
            for leaf in batch.leaves():
                leaf.grad = None

    def touched_experts(self) -> float:
        """Experts that a batch chooses, mean over the copies."""
        counts = [len(torch.unique(batch.experts)) for batch in self.batches]
        return sum(counts) / len(counts)


def router_logits(work: Workload, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random logits [T, E] whose best K spread over experts as the kind of routing says.

    zipf: the expert of rank r is r + 1 times as unlikely as the first; hot: the first K experts
    take every token; balanced: all experts get as many choices, up to one.
    """
    shape = (work.tokens, work.experts)
    logits = torch.randn(shape, generator=generator, device=device)
    if work.routing == "zipf":
        ranks = torch.arange(1, work.experts + 1, device=device)
        gumbel = -torch.rand(shape, generator=generator, device=device).log_().neg_().log_()
        logits = gumbel - ranks.log()
    elif work.routing == "hot":
        logits[:, : work.k] += 100
    elif work.routing == "balanced":
        choice = torch.arange(work.rows, device=device).view(work.tokens, work.k)
        logits.scatter_add_(1, choice % work.experts, torch.full_like(choice, 100).float())
    return logits


def route(logits: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Softmax in fp32, the best k, weights that sum to one: as transformers' Qwen3 routes."""
    best, experts = logits.float().softmax(-1).topk(k, dim=-1)
    return experts, (best / best.sum(-1, keepdim=True)).to(dtype)


def _batch(work: Workload, generator: torch.Generator, device: torch.device) -> Batch:
    dtype = work.torch_dtype

    def numbers() -> Tensor:
        shape = (work.tokens, work.d)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    logits = router_logits(work, generator, device)
    experts, weights = route(logits, work.k, dtype)
    return Batch(
        numbers().requires_grad_(),
        numbers(),
        logits.to(dtype).requires_grad_(),
        experts,
        experts.int(),
        weights.detach().requires_grad_(),
    )


def make_inputs(work: Workload, device: torch.device, seed: int = 1) -> Inputs:
    """Weights and as many copies of a batch as do not fit the L2 cache together, up to a few."""
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(*shape: int) -> nn.Parameter:
        made = torch.empty(shape, device=device, dtype=work.torch_dtype)
        for expert in made:  # one at a time: fp32 randoms of all would be twice the weights
            expert.copy_(
                torch.randn(shape[1:], generator=generator, device=device) * shape[-1] ** -0.5
            )
        return nn.Parameter(made)

    up = matrix(work.experts, 2 * work.n, work.d)
    down = matrix(work.experts, work.d, work.n)
    copies = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        copies = -(-2 * cache // (2 * work.tokens * work.d * work.itemsize))
        copies = max(2, min(copies, MOST_COPIES))
    return Inputs(up, down, [_batch(work, generator, device) for _ in range(copies)])
