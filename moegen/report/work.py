"""The table of FLOPs for one token, by role."""

from __future__ import annotations

from fractions import Fraction

from rich.console import Console

from moegen.estimator import Estimate, caches
from moegen.report import numbers
from moegen.report.parameters import role_name
from moegen.report.screen import note, table
from moegen.spec.words import listed


def print_flops(screen: Console, made: Estimate) -> None:
    """FLOPs of a token, an image, ... in training, and of a new token in decoding."""
    forward, training = made.forward_flops, made.training_flops
    backward = training - forward
    columns = ("role", ">forward", ">backward", ">training", ">share")
    footer = ("total", *map(numbers.flops, (forward, backward, training)), "")
    rows = table(f"FLOPs per {made.plan.spec.model.unit}", columns, footer=footer)
    parts = {role: (f.forward, f.backward) for role, f in made.flops.items()}
    for role, pair in sorted(parts.items(), key=lambda part: part[1], reverse=True):
        both = sum(pair, Fraction(0))
        cells = map(numbers.flops, (*pair, both))
        rows.add_row(role_name(role), *cells, numbers.share(both, training))
    screen.print()
    screen.print(rows)
    if made.sides:
        _sides(screen, made)
    _notes(screen, made)


def _sides(screen: Console, made: Estimate) -> None:
    """FLOPs of one unit of each sort, a sort a column, in a forward pass."""
    total = {
        u: sum((f.forward for f in side.values()), Fraction(0)) for u, side in made.sides.items()
    }
    footer = ("total", *map(numbers.flops, total.values()))
    columns = ("role", *(f">{unit}" for unit in made.sides))
    rows = table("FLOPs forward, per", columns, footer=footer)
    for role in made.flops:
        of_role = (side.get(role) for side in made.sides.values())
        cells = (numbers.flops(f.forward) if f else "-" for f in of_role)
        rows.add_row(role_name(role), *cells)
    screen.print()
    screen.print(rows)


def _notes(screen: Console, made: Estimate) -> None:
    model, work = made.plan.spec.model, made.plan.workload
    over = f"a sequence of {numbers.exact(work.sequence)} tokens"
    over = model.workload(1, work.sequence) if made.sides else over
    pairs = (
        " Attention counts the pairs that the causal mask, and a window if any, lets through: the "
        f"mean over {over}."
    )
    causal = made.decode_flops is not None and hasattr(model, "attention")
    note(screen, f"A multiply-accumulate is 2 FLOPs.{pairs if causal else ''}")
    if made.recurrent_steps:
        steps = numbers.exact(made.recurrent_steps)
        note(screen, f"A forward pass has {steps} recurrent steps, which wait for each other.")
    for sentence in model.remarks():
        note(screen, sentence)
    if any(one.moe.capacity for one in model.routed()):
        note(screen, "Routed experts count as if capacity refused nothing: at most so much.")
    if made.checkpointing:
        note(screen, "Backward includes the layers' second forward pass (--checkpointing).")
    if made.decode_flops is not None:
        decode = numbers.work(made.decode_flops)
        place = ""
        if made.cache_bytes_per_token is not None:
            held = listed([numbers.exact(n) for _, n in caches(made.plan).values()], "and")
            place = f" in a cache of {held} positions"
        screen.print(f"Decoding one token{place}: {decode}.")
