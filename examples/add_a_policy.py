"""Uses a routing policy from a user's own file, examples/confident.py: spec, estimate, training.

Run from the repository root as `python -m examples.add_a_policy`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import examples.confident  # noqa: F401  (registers the kind)
import moegen

SPEC = {
    "name": "confident",
    "model": {
        "kind": "decoder",
        "vocab_size": 64,
        "d_model": 64,
        "layers": 2,
        "max_sequence": 128,
        "attention": {"heads": 4, "kv_heads": 2},
        "moe": {
            "experts": {"count": 8, "width": 64},
            "router": {"select": {"kind": "confident", "k": 3, "share": 0.8}, "gate": "sum"},
            "losses": {"balance": 0.01},
        },
    },
}


def refused() -> str:
    """What the spec's reader says of a value that the policy's own field does not allow."""
    try:
        moegen.load(SPEC, {"moe.router.select.share": 1.5})
    except moegen.SpecError as error:
        return str(error)
    raise AssertionError("a share of 1.5 was let through")


def train(steps: int) -> tuple[float, float, float]:
    """Losses of the first and last step, and experts met a token, learning one fixed batch."""
    torch.manual_seed(0)
    model = moegen.module(SPEC).Model()
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(64, (4, 64))
    losses, met = [], 0.0
    for _ in range(steps):
        total, output = model.training_loss(ids)
        adam.zero_grad()
        total.backward()
        adam.step()
        losses.append(total.item())
        met = output.routing[-1].load.sum().item() / ids.numel()
    return losses[0], losses[-1], met


def emitted() -> str:
    """The source of the policy's own op, as it stands in the package, which imports torch only."""
    package = moegen.module(SPEC)
    place = f"{package.__path__[0]}/ops.py"
    with open(place, encoding="utf-8") as file:
        text = file.read()
    start = text.index("def drop_weak")
    return text[start:].partition("\n\n\n")[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Show each stage of the compiler taking the policy as its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args(arguments).steps
    print(refused())
    estimate = moegen.estimate(SPEC)
    print(f"\n{estimate.counts.total:,} parameters, at most {estimate.counts.active:,} a token")
    print(f"\nIn the emitted ops.py:\n\n{emitted()}\n")
    first, last, met = train(steps)
    print(f"loss {first:.3f} after 1 step, {last:.3f} after {steps}")
    print(f"{met:.2f} experts met a token in the last layer, of 3 at most")


if __name__ == "__main__":
    main()
