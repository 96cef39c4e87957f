"""Times our MoE layer against transformers' on this CPU: same weights, forward and backward.

Run from the repository root as `python benchmarks/moe_layer_cpu.py`; outputs and gradients are
compared before anything is timed, and the repeats of all implementations are interleaved.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moegen.ops.experts import combine, gather_rows, grouped_linear
from moegen.ops.routing import sort_by_expert, top_k


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int
    dim: int
    hidden: int
    experts: int
    k: int
    normalise: bool = True


SHAPES = (
    Shape("tiny", 512, 256, 128, 16, 4),
    Shape("small", 2048, 512, 256, 32, 4),
    Shape("medium", 1024, 1024, 512, 64, 8),
    Shape("olmoe-like", 512, 2048, 1024, 64, 8, normalise=False),
)
THEIRS = ("grouped_mm", "batched_mm", "eager")
SLOW = 3.0
LIMIT = 6e9  # bytes that batched_mm may spend on one copy of a matrix per row


class OurBlock(nn.Module):
    """Softmax top-k router and SwiGLU experts from our ops, gate and up in one matrix or two."""

    def __init__(self, shape: Shape, block: Any, *, fused: bool) -> None:
        super().__init__()
        self.shape, self.fused = shape, fused
        self.router = nn.Parameter(block.gate.weight.detach())
        self.w_down = nn.Parameter(block.experts.down_proj.detach())
        if fused:
            self.w_gate_up = nn.Parameter(block.experts.gate_up_proj.detach())
        else:
            gate, up = block.experts.gate_up_proj.detach().chunk(2, dim=1)
            self.w_gate = nn.Parameter(gate.contiguous())
            self.w_up = nn.Parameter(up.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = F.linear(tokens, self.router).softmax(-1, dtype=torch.float32)
        experts = top_k(scores, self.shape.k)
        weight = scores.gather(-1, experts)
        if self.shape.normalise:
            weight = weight / weight.sum(-1, keepdim=True)
        order, ends = sort_by_expert(experts, self.shape.experts)
        rows = gather_rows(tokens, order)
        if self.fused:
            gate, up = grouped_linear(rows, self.w_gate_up, ends).chunk(2, dim=-1)
        else:
            gate = grouped_linear(rows, self.w_gate, ends)
            up = grouped_linear(rows, self.w_up, ends)
        rows = grouped_linear(F.silu(gate) * up, self.w_down, ends)
        return combine(rows, order, weight).view_as(x)

    def weight_gradients(self) -> list[Any]:
        if self.fused:
            return [self.router.grad, self.w_gate_up.grad, self.w_down.grad]
        gate_up: Any = torch.cat(
            [g.grad for g in (self.w_gate, self.w_up) if g.grad is not None], 1
        )
        return [self.router.grad, gate_up, self.w_down.grad]


@dataclass
class Result:
    shape: Shape
    milliseconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    fastest_of_theirs: str = ""


def their_block(shape: Shape, implementation: str, like: nn.Module | None = None) -> nn.Module:
    """A block of Qwen3 with random weights, or with those of the block `like`."""
    config = Qwen3MoeConfig(
        hidden_size=shape.dim,
        moe_intermediate_size=shape.hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.k,
        norm_topk_prob=shape.normalise,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    if like is None:
        block.to_empty(device="cpu")
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    else:
        block.load_state_dict(like.state_dict(), assign=True)
    return block


def step(block: Any, x: Tensor, grad: Tensor) -> Tensor:
    """One forward and backward pass; the gradients stay, in place of the block's and x's old."""
    block.zero_grad(set_to_none=True)
    x.grad = None
    out: Tensor = block(x)
    torch.autograd.backward(out, grad)
    return out.detach()


def check(ours: OurBlock, theirs: Any, x: Tensor, grad: Tensor) -> None:
    """Raise unless outputs and all gradients agree."""
    expected: list[Any] = [step(theirs, x, grad), x.grad]
    expected += [theirs.gate.weight.grad, theirs.experts.gate_up_proj.grad]
    expected += [theirs.experts.down_proj.grad]
    actual = [step(ours, x, grad), x.grad, *ours.weight_gradients()]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def measure(shape: Shape, repeats: int) -> Result:
    """Median step times; ratios are medians over repeats of ours to their fastest."""
    torch.manual_seed(1)
    x = torch.randn(1, shape.tokens, shape.dim, requires_grad=True)
    grad = torch.randn(1, shape.tokens, shape.dim)
    rows = shape.tokens * shape.k
    copies = 4 * rows * 2 * shape.hidden * shape.dim
    theirs = {
        name: their_block(shape, name) for name in THEIRS if name != "batched_mm" or copies < LIMIT
    }
    ours = {
        "ours": OurBlock(shape, theirs["grouped_mm"], fused=False),
        "ours, fused": OurBlock(shape, theirs["grouped_mm"], fused=True),
    }
    for block in ours.values():
        check(block, theirs["grouped_mm"], x, grad)
    return timed(shape, {**ours, **theirs}, lambda block: step(block, x, grad), repeats)


def clocked(run: Callable[[nn.Module], Tensor], block: nn.Module) -> float:
    start = time.perf_counter()
    run(block)
    seconds = time.perf_counter() - start
    block.zero_grad(set_to_none=True)
    return seconds


def timed(
    shape: Shape,
    blocks: dict[str, nn.Module],
    run: Callable[[nn.Module], Tensor],
    repeats: int,
) -> Result:
    """Interleave the repeats; of theirs, what is SLOW times slower than the fastest is left out."""
    # The first step warms up; the best of the others is what noise has troubled least.
    times = {n: [clocked(run, block) for _ in range(4)][1:] for n, block in blocks.items()}
    fastest = min(min(t) for t in times.values())
    for _ in range(repeats):
        for name, block in blocks.items():
            if name not in THEIRS or min(times[name]) < SLOW * fastest:
                times[name].append(clocked(run, block))
    result = Result(shape, {n: 1e3 * statistics.median(t) for n, t in times.items()})
    most = max(len(t) for t in times.values())
    theirs = [name for name in THEIRS if name in blocks and len(times[name]) == most]
    result.fastest_of_theirs = min(theirs, key=lambda name: result.milliseconds[name])
    for name in ("ours", "ours, fused"):
        pairs = zip(times[name], times[result.fastest_of_theirs], strict=True)
        result.ratios[name] = statistics.median(a / b for a, b in pairs)
    return result


def table(results: list[Result]) -> str:
    names = list(dict.fromkeys(name for r in results for name in r.milliseconds))
    head = [
        "shape",
        "T",
        "d",
        "n",
        "E",
        "K",
        *(f"{name}, ms" for name in names),
        "ours / fastest",
        "fused / fastest",
        "fastest",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in results:
        s = r.shape
        cells = [s.name, s.tokens, s.dim, s.hidden, s.experts, s.k]
        cells += [f"{r.milliseconds[n]:.1f}" if n in r.milliseconds else "-" for n in names]
        cells += [f"{r.ratios['ours']:.2f}", f"{r.ratios['ours, fused']:.2f}", r.fastest_of_theirs]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--shapes", nargs="*", choices=[s.name for s in SHAPES])
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    chosen = [s for s in SHAPES if not arguments.shapes or s.name in arguments.shapes]
    results = [measure(shape, arguments.repeats) for shape in chosen]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, fp32,", end=" ")
    print(f"{torch.get_num_threads()} threads, {platform.machine()}\n")
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
