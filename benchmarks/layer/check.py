"""Whether a variant computes the layer, before anything about it is measured."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.layer.inputs import Inputs
from benchmarks.layer.record import Outcome
from benchmarks.layer.reference import NAMES, Reference, error, verdict
from benchmarks.layer.shapes import Workload
from benchmarks.layer.variants import Absent, Forward

INFINITE = (float("inf"), float("inf"))


def attempt(action: Callable[[], object]) -> str:
    """Empty if the action went through, else what it raised; Absent passes.

    Memory that a failed attempt left is freed. If the device itself is lost, waiting for it
    raises, and the run ends: no process can mend that.
    """
    try:
        action()
        return ""
    except Absent:
        raise
    except Exception as problem:
        lines = str(problem).strip().splitlines() or [""]
        why = f"{type(problem).__name__}: {lines[0][:200]}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return why


def gradients(forward: Forward, inputs: Inputs) -> dict[str, Tensor | None]:
    """Output and gradients for the first copy."""
    batch = inputs.batches[0]
    inputs.clear()
    out = forward(batch)
    torch.autograd.backward(out, batch.grad)
    grads = (batch.x.grad, batch.weights.grad, inputs.up.grad, inputs.down.grad)
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


def _same(some: dict[str, Tensor | None], others: dict[str, Tensor | None]) -> bool:
    return all(
        a is not None and b is not None and torch.equal(a, b)
        for a, b in zip(some.values(), others.values(), strict=True)
    )


def check(
    outcome: Outcome, forward: Forward, inputs: Inputs, expected: Reference, work: Workload
) -> None:
    """Compare with the reference, inference too, and run twice to see whether bits repeat."""
    with torch.no_grad():
        inferred = forward(inputs.batches[0])
    outcome.errors["inference"] = error(inferred, expected.tensors["out"])
    del inferred
    if not work.decodes:
        found = gradients(forward, inputs)
        for name, value in found.items():
            exact = expected.tensors[name]
            outcome.errors[name] = INFINITE if value is None else error(value, exact)
        outcome.repeatable = _same(found, gradients(forward, inputs))
    outcome.why = verdict(outcome.errors, work.dtype)
    outcome.state = "wrong" if outcome.why else "right"
    inputs.clear()
