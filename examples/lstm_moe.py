"""Experts between two LSTMs, as the sparsely-gated layer was first trained, on Python's sources.

Run from the repository root as `python -m examples.lstm_moe`. A dense LSTM and mixtures of 4, 16
and 64 experts have about equal compute for a byte; one mixture has two levels, and one is left
without its balance losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from examples.corpus import Corpus, standard_library
from examples.harness import (
    About,
    Claim,
    Results,
    Run,
    Schedule,
    Setting,
    command,
    compiled,
    fit,
)
from examples.harness.metrics import evaluating
from examples.harness.results import final_mean
from examples.plot import canvas

ABOUT = About(
    "lstm_moe",
    "The sparsely-gated layer between two LSTMs",
    "Shazeer et al. 2017, Outrageously Large Neural Networks",
    "Running only the k best of many experts separates a model's size from its cost. What made it "
    "work is noise before the choice, losses that keep importance and load even, and merging all "
    "time steps of a batch, so that every expert has rows enough to learn from.",
)
MEASURE = "nats a byte"
DENSE, UNBALANCED, NESTED = "dense LSTM", "MoE-16, no losses", "MoE-64-h"
PRESET = {"model.moe.preset": "shazeer2017-hierarchical"}
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    DENSE: ("lstm-tiny", {}),
    "MoE-4": ("lstm-moe-tiny", {"model.moe.experts.count": 4}),
    "MoE-16": ("lstm-moe-tiny", {}),
    "MoE-64": ("lstm-moe-tiny", {"model.moe.experts.count": 64}),
    NESTED: (
        "lstm-moe-tiny",
        {
            **PRESET,
            "model.moe.experts.count": 8,
            "model.moe.experts.nested.count": 8,
        },
    ),
    UNBALANCED: ("lstm-moe-tiny", {"model.moe.losses.importance": 0, "model.moe.losses.load": 0}),
}
BATCH, LENGTH = 16, 128
TAIL = 10  # points of a load's history that the claims look at
EVEN, SKEWED = 3.0, 2.0  # times an even share, the most; times the balanced mixture's, the least


def held_out(model: Any, ids: Tensor) -> dict[str, float]:
    """Nats a byte on sequences [B, S] that no training saw."""
    with evaluating(model):
        parts = torch.split(ids, BATCH)
        total = sum(float(model.loss(model(part)[0], part)) * len(part) for part in parts)
    return {MEASURE: total / len(ids)}


def batches(corpus: Corpus, draw: torch.Generator, length: int) -> Iterator[Tensor]:
    """Random sequences of the training text, for ever."""
    while True:
        yield corpus.batch(BATCH, length, draw)


def busiest(run: Run) -> float:
    """The busiest expert's load over an even one, near the end; 1 where there are no experts."""
    if not run.loads:
        return 1.0
    shares = torch.tensor(run.loads[0].shares[-TAIL:]).mean(0)
    return float(shares.max() * len(shares))


# What came out


def claims(runs: Sequence[Run]) -> list[Claim]:
    """The paper's, beside what was seen."""
    of = {system: [run for run in runs if run.system == system] for system in SYSTEMS}
    nats = {system: final_mean(same, MEASURE) for system, same in of.items()}
    few, some, many = (nats[f"MoE-{n}"] for n in (4, 16, 64))
    load = {s: sum(map(busiest, same)) / len(same) for s, same in of.items()}
    return [
        Claim(
            "at about equal compute a mixture predicts better than a dense LSTM",
            f"MoE-64 {many:.3f} {MEASURE}, dense LSTM {nats[DENSE]:.3f}",
            many < nats[DENSE],
        ),
        Claim(
            "without sparsity (4 of 4 experts) a mixture is no better than a dense LSTM",
            f"MoE-4 {few:.3f}, dense LSTM {nats[DENSE]:.3f}; within 2% is called no better",
            few > 0.98 * nats[DENSE],
        ),
        Claim(
            "more experts, of which each byte meets as many, predict better",
            f"{few:.3f} with 4, {some:.3f} with 16, {many:.3f} with 64",
            many < some < few,
        ),
        Claim(
            "two levels of gates do about as well as one",
            f"MoE-64-h {nats[NESTED]:.3f}, MoE-64 {many:.3f}; within 2% is called as well",
            abs(nats[NESTED] / many - 1) < 0.02,
        ),
        Claim(
            "the losses keep loads even, and without them a few experts get most",
            f"the busiest of 16 has {load['MoE-16']:.1f} times an even load with them, "
            f"{load[UNBALANCED]:.1f} times without",
            load["MoE-16"] < EVEN and load[UNBALANCED] > SKEWED * load["MoE-16"],
        ),
        Claim(
            "without the losses the mixture predicts worse",
            f"MoE-16 {some:.3f} with them, {nats[UNBALANCED]:.3f} without",
            some < nats[UNBALANCED],
        ),
    ]


def of_capacity(runs: Sequence[Run]) -> Any:
    """What is predicted over parameters; all systems cost about the same a byte."""
    figure = canvas(5.2, 3.8)
    if figure is None:
        return None
    axes = figure.subplots()
    for system in SYSTEMS:
        same = [run for run in runs if run.system == system]
        place = (same[0].parameters or 0, final_mean(same, MEASURE))
        axes.plot(*place, "o", label=system)
        axes.annotate(system, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="parameters", ylabel=f"held-out {MEASURE}")
    axes.grid(alpha=0.3)
    return figure


@command(ABOUT, seeds=1)
def main(setting: Setting) -> Results:
    """Train all systems on the same bytes."""
    corpus = standard_library(setting(16_000_000, 400_000))
    length = setting(LENGTH, 24)
    exam = corpus.examination(setting(128, 16), length)
    schedule = Schedule(setting(400, 6), evaluations=setting(9, 3))
    runs = []
    for system, (spec, changes) in SYSTEMS.items():
        for seed in setting.all_seeds:
            made = compiled(f"specs/{spec}.yaml", changes, seed=seed, batch=BATCH, sequence=length)
            runs.append(
                fit(
                    made.run(system, seed),
                    made.model,
                    batches(corpus, setting.draw(seed), length),
                    made.model.training_loss,
                    partial(held_out, made.model, exam),
                    schedule,
                    setting.console,
                )
            )
    about = (
        f"{corpus.files:,} files of Python's own sources, {len(corpus.train):,} bytes to learn "
        f"from; bytes of other files to be judged by, where the frequencies of bytes alone cost "
        f"{corpus.unigram_loss(exam):.3f} {MEASURE}"
    )
    return Results(about, runs, claims(runs), {"capacity": of_capacity(runs)})


if __name__ == "__main__":
    main()
