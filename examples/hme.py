"""Hierarchical mixtures on a real table, by EM and by gradient; and three losses of mixtures.

Run from the repository root as `python -m examples.hme`. A tree of linear gates over 16 linear
experts says how many bicycles are rented in an hour. It is fitted by EM and by three ways to
descend a gradient, beside one linear expert and one network of its size. Then a flat mixture is
trained under the three losses of Jacobs et al. 1991: under which one do experts specialise?
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.data.dataset import Dataset, Part
from examples.data.tables import bikes
from examples.harness import About, Results, Run, Schedule, Setting, command, compiled, fit
from examples.harness.fit import bar, described, shares_over_steps
from examples.harness.metrics import evaluating, gaussian_nats, r2, spread
from examples.hme_report import (
    ADAM,
    BATCHES,
    DESCENT,
    EM,
    LINEAR,
    NETWORK,
    OBJECTIVES,
    of_leaves,
    of_likelihood,
    of_losses,
    of_trees,
)

ABOUT = About(
    "hme",
    "Hierarchical mixtures of experts",
    "Jordan and Jacobs 1994, Hierarchical Mixtures of Experts and the EM Algorithm; Jacobs, "
    "Jordan, Nowlan and Hinton 1991, Adaptive Mixtures of Local Experts",
    "Gates in a tree split the inputs softly, as a decision tree does hard. Seen as a likelihood "
    "with hidden choices, the whole is fitted by EM: posteriors say which leaf is responsible for "
    "a row, and each gate and leaf solves a weighted regression of its own. And it is the loss, "
    "not the network, that makes experts specialise: compare each with the whole target.",
)
SPECS = Path(__file__).parent.parent / "specs"
FIRST = "model.layers.0"
ONE = {f"{FIRST}.experts.count": 1, f"{FIRST}.router": {}}
VARIANCE = 0.1  # of the noise around an expert, where that of the target is 1
TREE, TREES = "hme1994-16-leaves", "bicycles"
GRADIENTS = (DESCENT, ADAM, BATCHES)
LOSSES, EXPERTS = "three losses", 8
BATCH = 128

Judge = Callable[[Any, Dataset], Mapping[str, float]]


@dataclass(frozen=True)
class Size:
    """Passes over the rows: of EM, of descents on all rows at once, and of those by batches."""

    em: int
    whole: int
    batched: int


def made(spec: str, data: Dataset, seed: int, overrides: Mapping[str, Any]) -> Any:
    """A spec's model for this table."""
    sized: dict[str, Any] = {"model.inputs": data.train.x.shape[1]}
    sized["model.target"] = {"kind": "values", "variance": VARIANCE}
    return compiled(SPECS / f"{spec}.yaml", {**sized, **overrides}, seed=seed, batch=BATCH)


def targets(part: Part) -> Tensor:
    """y [N, 1]."""
    return part.y.unsqueeze(-1)


def judged(model: Any, data: Dataset) -> dict[str, float]:
    """Variance explained, and nats a row; of the rows of training too."""
    with evaluating(model):
        explained = r2(model.predict(data.held_out.x)[:, 0], data.held_out.y)
        parts = (data.held_out, data.train)
        nats = [-float(model.log_likelihood(p.x, targets(p)).mean()) for p in parts]
    return {"R2": explained, "nats": nats[0], "training nats": nats[1]}


def judged_alone(model: Any, data: Dataset) -> dict[str, float]:
    """The same of a single expert: its variance is that of what it leaves over in training."""
    with evaluating(model):
        train, held_out = (model.predict(p.x)[:, 0] for p in (data.train, data.held_out))
    left = (train - data.train.y).square().mean()
    nats = [
        gaussian_nats(said, left.expand_as(said), part.y)
        for said, part in ((held_out, data.held_out), (train, data.train))
    ]
    return {"R2": r2(held_out, data.held_out.y), "nats": nats[0], "training nats": nats[1]}


# The tree


def by_em(setting: Setting, run: Run, model: Any, data: Dataset, passes: int) -> Run:
    """Steps of EM, each one pass over all rows."""
    judge = judged_alone if run.system == LINEAR else judged
    x, y, gates = data.train.x, targets(data.train), []
    run.measure(0, judge(model, data))
    started = time.perf_counter()
    with bar(setting.console) as progress:
        task = progress.add_task(run.name, total=passes)
        for number in range(1, passes + 1):
            model.em_step(x, y)
            run.measure(number, judge(model, data))
            with evaluating(model):
                gates.append(model(data.held_out.x).gates.mean(0))
            progress.update(task, advance=1, description=described(run))
    run.seconds = time.perf_counter() - started
    if run.system != LINEAR:
        loads = shares_over_steps("leaves", [*range(1, passes + 1)], torch.stack(gates))
        run.loads.append(loads)
    setting.console.print(f"{described(run)}  ({run.seconds:.0f} s)")
    return in_nats(run)


def by_gradient(
    setting: Setting, run: Run, model: Any, data: Dataset, passes: int, judge: Judge
) -> Run:
    """Descend for so many passes over the rows; steps of the record are passes."""
    whole = run.system in (DESCENT, ADAM)
    batches = repeat(data.train) if whole else data.train.batches(BATCH, setting.draw(run.seed))
    a_pass = 1 if whole else max(len(data.train) // BATCH, 1)
    rate = {DESCENT: 2.0, ADAM: 3e-2}.get(run.system, 1e-2)
    kind = torch.optim.SGD if run.system == DESCENT else torch.optim.Adam
    parts = 25 if passes % 25 == 0 else passes
    fit(
        run,
        model,
        batches,
        lambda part: model.training_loss(part.x, targets(part)),
        lambda: judge(model, data),
        Schedule(passes * a_pass, rate, parts + 1, clip=float("inf")),
        setting.console,
        shares=lambda out: {"experts": out.gates.mean(0)} if run.system != NETWORK else {},
        adam=kind(model.parameters(), lr=rate),
    )
    run.held_out = [(round(step / a_pass), values) for step, values in run.held_out]
    by_pass: dict[int, list[float]] = {}
    for step, loss in run.loss:
        by_pass.setdefault(math.ceil(step / a_pass), []).append(loss)
    run.loss = [(number, spread(values)[0]) for number, values in by_pass.items()]
    return run


def in_nats(run: Run) -> Run:
    """The same with its loss in nats, so that those of all systems can be compared."""
    run.loss = [(number, values["training nats"]) for number, values in run.held_out if number]
    return run


def trees(setting: Setting, data: Dataset, size: Size) -> tuple[list[Run], Any]:
    """All systems that say how many bicycles are rented, and one tree fitted by EM."""
    runs, kept = [], None
    hidden = {f"{FIRST}.experts.hidden": [42]}  # as many parameters as the tree has
    for seed in setting.all_seeds:
        tree = made(TREE, data, seed, {})
        kept = kept or tree.model
        runs.append(by_em(setting, tree.run(EM, seed, TREES), tree.model, data, size.em))
        for system in (*GRADIENTS, NETWORK):
            own = made(TREE, data, seed, {**ONE, **hidden} if system == NETWORK else {})
            passes = size.whole if system in (DESCENT, ADAM) else size.batched
            judge = judged_alone if system == NETWORK else judged
            run = own.run(system, seed, TREES)
            runs.append(in_nats(by_gradient(setting, run, own.model, data, passes, judge)))
    one = made(TREE, data, setting.seed, ONE)
    runs.append(by_em(setting, one.run(LINEAR, setting.seed, TREES), one.model, data, 1))
    return runs, kept


# Three losses


def judged_apart(model: Any, data: Dataset) -> dict[str, float]:
    """R2 of the prediction, of the highest gate's expert alone, nats, and the gates' entropy."""
    with evaluating(model):
        out, y = model(data.held_out.x), data.held_out.y
        blend = model.predict(data.held_out.x)[:, 0]
        nats = -float(model.log_likelihood(data.held_out.x, targets(data.held_out)).mean())
    best = out.gates.argmax(-1, keepdim=True)
    alone = out.outputs[..., 0].gather(1, best)[:, 0]
    entropy = torch.special.entr(out.gates.double()).sum(-1).mean()
    return {
        "R2": r2(blend, y),
        "R2 of one expert": r2(alone, y),
        "nats": nats,
        "gate entropy": float(entropy),
    }


def losses(setting: Setting, data: Dataset, size: Size) -> list[Run]:
    """A flat mixture under each loss."""
    runs = []
    for objective in OBJECTIVES:
        for seed in setting.all_seeds:
            said = {f"{FIRST}.experts.count": EXPERTS, "model.objective": objective}
            flat = made("jacobs1991", data, seed, said)
            run = flat.run(objective, seed, LOSSES)
            runs.append(by_gradient(setting, run, flat.model, data, size.batched, judged_apart))
    return runs


@command(ABOUT, seeds=2)
def main(setting: Setting) -> Results:
    """The tree by four ways, then three losses."""
    data = bikes().first(setting(10**9, 300))
    size = Size(setting(25, 3), setting(100, 3), setting(15, 2))
    runs, tree = trees(setting, data, size)
    flat = losses(setting, data, size)
    figures = {
        "likelihood": of_likelihood(runs),
        "leaves": of_leaves(tree, data, ("temp", "humidity", "windspeed")),
    }
    return Results(data.about, [*runs, *flat], [*of_trees(runs), *of_losses(flat)], figures)


if __name__ == "__main__":
    main()
