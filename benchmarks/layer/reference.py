"""The layer in float64, one expert at a time, and how far a variant is from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.layer.inputs import Batch, Inputs
from benchmarks.layer.shapes import Workload

# Of a whole tensor by norms; a single row may be WORST_ROW times as far.
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 1e-4}
WORST_ROW = 8.0
NAMES = ("out", "d_x", "d_weights", "d_up", "d_down")
# Where float64 would take too long (consumer GPUs have little of it) fp32 without TF32 serves.
MOST_FLOAT64 = 2e14


@dataclass
class Reference:
    """Output and gradients: out and d_x [T, d], d_weights [T, K], d_up and d_down as weights."""

    kind: str
    tensors: dict[str, Tensor]


def reference(work: Workload, inputs: Inputs, batch: Batch) -> Reference:
    """Forward and backward by hand, since autograd would keep every expert in float64."""
    large = 3 * work.flops > MOST_FLOAT64
    dtype = torch.float32 if large else torch.float64
    # Weights' gradients are all of a layer's size: bf16 ones are compared with fp32 ones.
    kept = dtype if work.dtype == "fp32" else torch.float32
    x, grad = batch.x.detach().to(dtype), batch.grad.to(dtype)
    share = batch.weights.detach().to(dtype)
    out, d_x, d_share = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(share)
    d_up = torch.zeros_like(inputs.up, dtype=kept, requires_grad=False)
    d_down = torch.zeros_like(inputs.down, dtype=kept, requires_grad=False)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    for e in range(work.experts):
        token, choice = (batch.experts == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        up, down = inputs.up[e].detach().to(dtype), inputs.down[e].detach().to(dtype)
        rows, of = x[token], share[token, choice].unsqueeze(-1)
        gate, other = (rows @ up.t()).chunk(2, -1)
        sigmoid = gate.sigmoid()
        hidden = gate * sigmoid * other
        out.index_add_(0, token, hidden @ down.t() * of)
        d_rows = grad[token]
        d_hidden = d_rows @ down
        d_share[token, choice] = (d_hidden * hidden).sum(-1)
        d_down[e] = d_rows.t() @ (hidden * of)
        d_hidden = d_hidden * of
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        d_first = torch.cat((d_hidden * other * slope, d_hidden * F.silu(gate)), -1)
        d_up[e] = d_first.t() @ rows
        d_x.index_add_(0, token, d_first @ up)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    found = dict(zip(NAMES, (out, d_x, d_share, d_up, d_down), strict=True))
    return Reference("fp32, expert by expert" if large else "float64, expert by expert", found)


def error(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative error of the tensor, by norms, and of its worst row.

    A row is compared with its own norm or the root mean square of all rows', whichever is more.
    Not-a-number anywhere makes both infinite.
    """
    if actual.shape != expected.shape:
        return float("inf"), float("inf")
    rows = expected.flatten(0, -2)
    found = actual.detach().flatten(0, -2)
    total = difference = worst = 0.0
    typical = _mean_square(rows) ** 0.5
    for part, exact in zip(_parts(found), _parts(rows), strict=True):
        wide = exact.double()
        off = (part.double() - wide).norm(dim=-1)
        norm = wide.norm(dim=-1)
        total += float(norm.square().sum())
        difference += float(off.square().sum())
        ratio = off / norm.clamp(min=max(typical, 1e-30))
        worst = max(worst, float(ratio.nan_to_num(nan=float("inf")).max()))
    relative = (difference / max(total, 1e-60)) ** 0.5
    finite = relative == relative
    return (relative, worst) if finite else (float("inf"), float("inf"))


def _mean_square(rows: Tensor) -> float:
    total = sum(float(part.double().square().sum()) for part in _parts(rows))
    return total / max(rows.shape[0], 1)


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, 4096)


def verdict(errors: dict[str, tuple[float, float]], dtype: str) -> str:
    """Empty if all errors are within bounds, else the ones that are not."""
    bound = TOLERANCE[dtype]
    return "; ".join(
        f"{name} off by {whole:.1e}, worst row {row:.1e}"
        for name, (whole, row) in errors.items()
        if whole > bound or row > WORST_ROW * bound
    )
