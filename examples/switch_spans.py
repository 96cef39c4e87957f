"""Switch: an encoder-decoder that fills in spans of text, one expert a token.

Run from the repository root as `python -m examples.switch_spans`. A dense T5 and a Switch
Transformer of its active size learn span corruption on the sources of Python's standard library.
Then with more experts, and without the loss that evens loads. At last the room of experts is
changed under the trained weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.classifiers import same_weights
from examples.corpus import Corpus, standard_library
from examples.data.spans import Corrupted, SpanCorruption
from examples.harness import About, Claim, Results, Run, Schedule, Setting, command, compiled, fit
from examples.harness.metrics import accuracy, evaluating, nats
from examples.harness.results import by_name, final_mean

ABOUT = About(
    "switch_spans",
    "Switch Transformer",
    "Fedus, Zoph and Shazeer 2021, Switch Transformers",
    "One expert a token is enough: k = 1, thought to give the router no gradient to learn from, "
    "trains as well as two, costs half, and makes routing, capacity and communication simple. With "
    "the T5 setting as it was, sparse models learned faster than dense ones of the same work, and "
    "the number of experts became a way to scale of its own.",
)
SPECS = Path(__file__).parent.parent / "specs"
TASK = SpanCorruption(length=128)
DENSE, SPARSE, MORE = "T5", "Switch, 8 experts", "Switch, 32 experts"
UNEVEN = "Switch, no balance loss"
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    DENSE: ("t5-spans", {}),
    SPARSE: ("switch-spans", {}),
    MORE: ("switch-spans", {"model.moe.experts.count": 32}),
    UNEVEN: ("switch-spans", {"model.moe.losses.balance.weight": 0.0}),
}
ROOMS = (0.5, 1.0, 1.25, 2.0, 4.0)  # capacity factors under trained weights
CLOSE = 0.01  # of nats: what is called as good
FEW = 0.01  # of all tokens


@dataclass(frozen=True)
class Text:
    """The corpus, and its part held out with its spans already left out."""

    corpus: Corpus
    exam: Corrupted

    @classmethod
    def of(cls, corpus: Corpus, sequences: int) -> Text:
        """So many sequences held out; always the same spans are left out of them."""
        rows = corpus.examination(sequences, TASK.length)
        return cls(corpus, TASK.corrupt(rows, torch.Generator().manual_seed(0)))

    def batches(self, size: int, draw: torch.Generator) -> Iterator[Corrupted]:
        """New sequences without end."""
        while True:
            yield TASK.corrupt(self.corpus.batch(size, TASK.length, draw), draw)

    def parts(self, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
        """What is held out, inputs and targets."""
        whole = (self.exam.inputs, self.exam.targets)
        return zip(*(torch.split(ids, size) for ids in whole), strict=True)


def judged(model: Any, text: Text) -> dict[str, float]:
    """Cross-entropy in nats an id of the targets, and the share that is guessed."""
    with evaluating(model):
        logits = torch.cat([model(ids, model.shifted(y)).logits for ids, y in text.parts()])
    flat, labels = logits.flatten(0, 1), text.exam.targets.flatten()
    return {"nats": nats(flat, labels), "accuracy": accuracy(flat, labels)}


@torch.no_grad()
def spread(model: Any, text: Text) -> dict[str, float]:
    """Choices refused with training's room, and the busiest expert over the mean, over layers."""
    model.train()
    outputs = [model(ids, model.shifted(y)) for ids, y in text.parts()]
    dropped = [record.dropped for output in outputs for record in output.routing]
    loads = torch.stack([torch.stack([r.load for r in output.routing]) for output in outputs])
    total = loads.double().sum(0)  # layers, experts
    return {
        "refused": float(torch.stack(dropped).double().mean()),
        "busiest over mean": float((total.amax(-1) / total.mean(-1)).mean()),
    }


def run_of(setting: Setting, system: str, seed: int, text: Text) -> Run:
    """One system trained once."""
    name, changes = SYSTEMS[system]
    size = setting(8, 4)
    path = SPECS / f"{name}.yaml"
    made = compiled(path, changes, seed=seed, batch=size, sequence=TASK.input_length)
    model = made.model
    run = fit(
        made.run(system, seed),
        model,
        text.batches(size, setting.draw(seed)),
        lambda part: model.training_loss(part.inputs, part.targets),
        lambda: judged(model, text),
        Schedule(setting(1500, 6), 4e-3, setting(6, 2)),
        setting.console,
    )
    if system != DENSE:
        run.notes = spread(model, text)
    if system in (SPARSE, UNEVEN):
        for room in setting(ROOMS, ROOMS[:1]):
            change = {**changes, "model.moe.capacity.eval_factor": room}
            other = same_weights(model, SPECS / f"{name}.yaml", change)
            run.notes[at(room)] = judged(other, text)["nats"]
    return run


def at(room: float) -> str:
    """The name of a note: the cost of the trained model with another capacity factor."""
    return f"nats at capacity {room:g}"


# Claims


def claims(runs: Sequence[Run]) -> list[Claim]:
    """The paper's, beside what was seen."""
    of = by_name(runs)
    cost = {name: final_mean(same, "nats") for name, same in of.items()}
    found = list(against_dense(of, cost))
    if MORE in of:
        many, few = cost[MORE], cost[SPARSE]
        more = Claim(
            "more experts, with the same work a token, learn better",
            f"{many:.3f} nats with 32 experts, {few:.3f} with 8",
            many < few,
        )
        found += [more, *of_room(of), *of_loads(of)]
    return found


def against_dense(of: Mapping[str, Sequence[Run]], cost: Mapping[str, float]) -> Iterator[Claim]:
    """Switch beside T5: at the end, and on the way."""
    yield Claim(
        "with the same work a token, Switch is better than T5 after the same steps",
        f"{cost[SPARSE]:.3f} nats an id against {cost[DENSE]:.3f}",
        cost[SPARSE] < cost[DENSE],
    )
    steps = [step for step, _ in of[DENSE][0].held_out]
    means = [
        sum(run.held_out[place][1]["nats"] for run in of[SPARSE]) / len(of[SPARSE])
        for place in range(len(steps))
    ]
    reached = next((s for s, m in zip(steps, means, strict=True) if m <= cost[DENSE]), None)
    yield Claim(
        "Switch is where T5 ends after a fraction of the steps (a seventh, at T5-Base's size)",
        f"T5's {cost[DENSE]:.3f} nats after {steps[-1]} steps, Switch's after "
        + (f"{reached}" if reached is not None else "more"),
        reached is not None and reached < steps[-1],
    )


def of_room(of: Mapping[str, Sequence[Run]]) -> Iterator[Claim]:
    """What the capacity factor does, under trained weights."""
    cost = {room: mean_note(of[SPARSE], at(room)) for room in ROOMS}
    said = ", ".join(f"{value:.3f} at {room:g}" for room, value in cost.items())
    yield Claim(
        "little room is enough: factors of 1.0 and 1.25 are about as good as 2.0",
        f"nats of one model by its capacity factor in evaluation: {said}; within {CLOSE} is called "
        "as good (the paper trains with each)",
        max(cost[1.0], cost[1.25]) < cost[2.0] + CLOSE,
    )
    refused = mean_note(of[SPARSE], "refused")
    yield Claim(
        "with the balance loss few tokens are refused, typically less than 1%",
        f"{refused:.1%} with the capacity factor of training, 1.25",
        refused < FEW,
    )


def of_loads(of: Mapping[str, Sequence[Run]]) -> Iterator[Claim]:
    """What the balance loss does."""
    names = ("busiest over mean", "refused")
    even, uneven = ([mean_note(of[name], what) for what in names] for name in (SPARSE, UNEVEN))
    yield Claim(
        "the balance loss evens the experts' loads",
        f"the busiest expert has {even[0]:.2f} times the mean load with it, {uneven[0]:.2f} "
        f"without; {even[1]:.1%} and {uneven[1]:.1%} of the tokens are refused",
        even[0] < uneven[0],
    )


def mean_note(runs: Sequence[Run], name: str) -> float:
    """A note, the mean over seeds."""
    return sum(run.notes[name] for run in runs) / len(runs)


@command(ABOUT, seeds=1)
def main(setting: Setting) -> Results:
    """Train all systems on one text."""
    text = Text.of(standard_library(setting(16_000_000, 1_000_000)), setting(128, 8))
    systems = setting(tuple(SYSTEMS), (DENSE, SPARSE))
    runs = [run_of(setting, system, seed, text) for system in systems for seed in setting.all_seeds]
    about = (
        f"span corruption of {len(text.corpus.train) / 1e6:.1f} MB of Python's standard library "
        f"(PSF licence), files held out; {TASK.left_out} of {TASK.length} bytes in {TASK.spans} "
        "spans are left out"
    )
    return Results(about, runs, claims(runs))


if __name__ == "__main__":
    main()
