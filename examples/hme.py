"""Hierarchical mixtures on a real table, by EM and by gradient; and three losses of mixtures.

Run from the repository root as `python -m examples.hme`. A tree of linear gates over 16 linear
experts says how many bicycles are rented in an hour. It is fitted by EM and by three ways to
descend a gradient, beside one linear expert and one network of its size. Then a flat mixture is
trained under the three losses of Jacobs et al. 1991: under which one do experts specialise?
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.data.dataset import Dataset, Part
from examples.data.tables import bikes
from examples.harness import About, Claim, Results, Run, Schedule, Setting, command, compiled, fit
from examples.harness.fit import bar, described, shares_over_steps
from examples.harness.metrics import evaluating, gaussian_nats, r2
from examples.harness.results import by_name, final_mean
from examples.plot import canvas

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
EM, DESCENT, ADAM, BATCHES = "tree, EM", "tree, descent", "tree, Adam", "tree, Adam by batches"
LINEAR, NETWORK = "one linear expert", "one network"
GRADIENTS = (DESCENT, ADAM, BATCHES)
LOSSES, EXPERTS = "three losses", 8
OBJECTIVES = ("cooperative", "competitive", "mixture")
BATCH = 128
FEWER = 5  # times: what is called far fewer passes
CLOSE = 0.02  # of R2: what is called as good


@dataclass(frozen=True)
class Size:
    """Passes over the rows: of EM, of descents on all rows at once, and of those by batches."""

    em: int
    whole: int
    batched: int


def made(spec: str, data: Dataset, seed: int, **overrides: Any) -> Any:
    """A spec's model for this table."""
    sized: dict[str, Any] = {"model.inputs": data.train.x.shape[1]}
    sized["model.target"] = {"kind": "values", "variance": VARIANCE}
    said = {key.replace("__", "."): value for key, value in overrides.items()}
    return compiled(SPECS / f"{spec}.yaml", {**sized, **said}, seed=seed, batch=BATCH)


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
    x, y = data.train.x, targets(data.train)
    gates = []
    run.measure(0, judge(model, data))
    started = time.perf_counter()
    with bar(setting.console) as progress:
        task = progress.add_task(run.name, total=passes)
        for number in range(1, passes + 1):
            run.loss.append((number, -model.em_step(x, y)))
            run.measure(number, judge(model, data))
            with evaluating(model):
                gates.append(model(data.held_out.x).gates.mean(0))
            progress.update(task, advance=1, description=described(run))
    run.seconds = time.perf_counter() - started
    if run.system != LINEAR:
        loads = shares_over_steps("leaves", [*range(1, passes + 1)], torch.stack(gates))
        run.loads.append(loads)
    setting.console.print(f"{described(run)}  ({run.seconds:.0f} s)")
    return run


def by_gradient(
    setting: Setting,
    run: Run,
    model: Any,
    data: Dataset,
    passes: int,
    judge: Callable[[], Mapping[str, float]],
) -> Run:
    """Descend for so many passes over the rows; steps of the record are passes."""
    whole = run.system in (DESCENT, ADAM)
    batches = repeat(data.train) if whole else data.train.batches(BATCH, setting.draw(run.seed))
    a_pass = 1 if whole else max(len(data.train) // BATCH, 1)
    rate = {DESCENT: 1.0, ADAM: 3e-2}.get(run.system, 1e-2)
    kind = torch.optim.SGD if run.system == DESCENT else torch.optim.Adam
    parts = 25 if passes % 25 == 0 else passes
    fit(
        run,
        model,
        batches,
        lambda part: model.training_loss(part.x, targets(part)),
        judge,
        Schedule(passes * a_pass, rate, parts + 1, clip=float("inf")),
        setting.console,
        shares=lambda out: {"experts": out.gates.mean(0)} if run.system != NETWORK else {},
        adam=kind(model.parameters(), lr=rate),
    )
    run.held_out = [(round(step / a_pass), values) for step, values in run.held_out]
    run.loss = [(max(round(step / a_pass), 1), loss) for step, loss in run.loss]
    return run


def trees(setting: Setting, data: Dataset, size: Size) -> tuple[list[Run], Any]:
    """All systems that say how many bicycles are rented, and one tree fitted by EM."""
    runs, kept = [], None
    for seed in setting.all_seeds:
        tree = made(TREE, data, seed)
        kept = kept or tree.model
        runs.append(by_em(setting, tree.run(EM, seed, TREES), tree.model, data, size.em))
        for system in GRADIENTS:
            tree = made(TREE, data, seed)
            passes = size.batched if system == BATCHES else size.whole
            run, model = tree.run(system, seed, TREES), tree.model
            by_gradient(setting, run, model, data, passes, lambda m=model: judged(m, data))  # type: ignore[misc]

            runs.append(run)
        one = made(TREE, data, seed, **ONE, **{f"{FIRST}.experts.hidden": [42]})
        run, model = one.run(NETWORK, seed, TREES), one.model
        by_gradient(setting, run, model, data, size.batched, lambda m=model: judged_alone(m, data))  # type: ignore[misc]
        runs.append(run)
    one = made(TREE, data, setting.seed, **ONE)
    runs.append(by_em(setting, one.run(LINEAR, setting.seed, TREES), one.model, data, 1))
    return runs, kept


def passes_to(runs: Sequence[Run], level: float) -> int | None:
    """Passes until the mean training nats of runs are at most this; None if they never are."""
    for place, (number, _) in enumerate(runs[0].held_out):
        values = [run.held_out[place][1]["training nats"] for run in runs]
        if sum(values) / len(values) <= level:
            return number
    return None


def faster(em: Sequence[Run], other: Sequence[Run], what: str) -> Claim:
    """Whether EM needs far fewer passes than a gradient to get where that ends."""
    system, passes = other[0].system, other[0].held_out[-1][0]
    level = final_mean(other, "training nats")
    needed = passes_to(em, level)
    said = f"after {needed}" if needed else f"not after {em[0].held_out[-1][0]}"
    seconds = [sum(run.seconds for run in runs) / len(runs) for runs in (em, other)]
    return Claim(
        f"EM needs far fewer passes over the rows than a gradient ({what})",
        f"{system} is at {level:.3f} nats of training after {passes} passes, EM {said} "
        f"({seconds[1]:.0f} s; all of EM {seconds[0]:.0f} s, as its least squares see rows several "
        f"times a pass); {FEWER} times fewer is called far fewer",
        needed is not None and needed * FEWER <= passes,
    )


def of_trees(runs: Sequence[Run]) -> list[Claim]:
    """What Jordan and Jacobs claim, beside what was seen."""
    of = {part[0].system: part for part in by_name(runs).values()}
    explained, nats = (
        {name: final_mean(part, measure) for name, part in of.items()} for measure in ("R2", "nats")
    )
    rises = [
        before - after
        for run in of[EM]
        for (_, before), (_, after) in zip(run.loss, run.loss[1:], strict=False)
    ]
    return [
        Claim(
            "no step of EM lowers the likelihood",
            f"the smallest gain of a pass is {min(rises):.2g} nats a row",
            min(rises) >= 0,
        ),
        faster(of[EM], of[DESCENT], "plain descent"),
        faster(of[EM], of[ADAM], "Adam, which came later"),
        faster(of[EM], of[BATCHES], "Adam on batches"),
        Claim(
            "a tree of experts is better than one linear model",
            f"R2 {explained[EM]:.4f} against {explained[LINEAR]:.4f}, {nats[EM]:.3f} nats against "
            f"{nats[LINEAR]:.3f}",
            explained[EM] > explained[LINEAR] and nats[EM] < nats[LINEAR],
        ),
        Claim(
            "it is about as exact as a network trained by backpropagation",
            f"R2 {explained[EM]:.4f} against {explained[NETWORK]:.4f}, within {CLOSE} is called as "
            "exact",
            explained[EM] > explained[NETWORK] - CLOSE,
        ),
        Claim(
            "as a mixture of densities it says more of the target than a mean can",
            f"{nats[EM]:.3f} nats a held-out row against {nats[NETWORK]:.3f} of the network with "
            "the best one variance",
            nats[EM] < nats[NETWORK],
        ),
    ]


# Three losses


def judged_apart(model: Any, data: Dataset) -> dict[str, float]:
    """R2 of the prediction, of the highest gate's expert alone, and the gates' entropy."""
    with evaluating(model):
        out, y = model(data.held_out.x), data.held_out.y
        blend = model.predict(data.held_out.x)[:, 0]
    best = out.gates.argmax(-1, keepdim=True)
    alone = out.outputs[..., 0].gather(1, best)[:, 0]
    entropy = torch.special.entr(out.gates.double()).sum(-1).mean()
    return {"R2": r2(blend, y), "R2 of one expert": r2(alone, y), "gate entropy": float(entropy)}


def losses(setting: Setting, data: Dataset, size: Size) -> list[Run]:
    """A flat mixture under each loss."""
    runs = []
    for objective in OBJECTIVES:
        for seed in setting.all_seeds:
            said = {f"{FIRST}.experts.count": EXPERTS, "model.objective": objective}
            flat = made("jacobs1991", data, seed, **said)
            run, model = flat.run(objective, seed, LOSSES), flat.model
            by_gradient(
                setting,
                run,
                model,
                data,
                size.batched,
                lambda m=model: judged_apart(m, data),  # type: ignore[misc]
            )
            runs.append(run)
    return runs


def of_losses(runs: Sequence[Run]) -> list[Claim]:
    """What Jacobs and the others claim, beside what was seen."""
    of = {name: [run for run in runs if run.system == name] for name in OBJECTIVES}
    means = {
        measure: {name: final_mean(part, measure) for name, part in of.items()}
        for measure in ("R2", "R2 of one expert", "gate entropy")
    }
    alone, entropy, blend = means["R2 of one expert"], means["gate entropy"], means["R2"]
    together, compete, mixture = OBJECTIVES

    def said(values: Mapping[str, float]) -> str:
        return ", ".join(f"{value:.3f} ({name})" for name, value in values.items())

    return [
        Claim(
            "experts whose blend is compared with the target cooperate, and none can answer alone",
            f"R2 of the highest gate's expert alone: {said(alone)}",
            alone[together] < min(alone[compete], alone[mixture]),
        ),
        Claim(
            "compared one by one they compete, and a row goes to few of them",
            f"entropy of the gates in nats: {said(entropy)}",
            entropy[together] > max(entropy[compete], entropy[mixture]),
        ),
        Claim(
            "the likelihood of the mixture is a better loss than the gates' mean of the errors",
            f"R2 {said({name: blend[name] for name in (compete, mixture)})}",
            blend[mixture] > blend[compete],
        ),
    ]


# Figures


def of_likelihood(runs: Sequence[Run]) -> Any:
    """Nats over passes, of the rows of training and of those held out."""
    figure = canvas(9.6, 3.8)
    if figure is None:
        return None
    for axes, measure in zip(figure.subplots(1, 2), ("training nats", "nats"), strict=True):
        for part in by_name(runs).values():
            system, count = part[0].system, len(part)
            if system == LINEAR:
                axes.axhline(part[0].final[measure], color="gray", linestyle="--", label=system)
                continue
            passes = [number for number, _ in part[0].held_out]
            mean = [
                sum(run.held_out[i][1][measure] for run in part) / count for i in range(len(passes))
            ]
            axes.plot(passes[1:], mean[1:], "o-", markersize=3, label=system)
        axes.set(xscale="log", xlabel="passes over the rows", ylabel=f"{measure} a row")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    return figure


def of_leaves(model: Any, data: Dataset, features: Sequence[str], bins: int = 12) -> Any:
    """Which leaf answers at which value of a feature: mean gates, a panel a feature."""
    known = [name for name in features if name in data.features]
    figure = canvas(4.2 * len(known), 3.4) if known else None
    if figure is None:
        return None
    with evaluating(model):
        gates = model(data.held_out.x).gates
    for axes, name in zip(figure.subplots(1, len(known), squeeze=False)[0], known, strict=True):
        order = data.held_out.x[:, data.features.index(name)].argsort()
        mean = torch.stack([gates[rows].mean(0) for rows in order.chunk(bins)], -1)
        image = axes.imshow(mean.tolist(), aspect="auto", vmin=0, cmap="viridis")
        axes.set(title=name, xlabel="from low to high", ylabel="leaf", xticks=[])
        axes.set_yticks(range(0, len(mean), 5))
        figure.colorbar(image, ax=axes)
    return figure


@command(ABOUT, seeds=2)
def main(setting: Setting) -> Results:
    """The tree by four ways, then three losses."""
    data = bikes().first(setting(10**9, 300))
    size = Size(setting(30, 3), setting(100, 3), setting(15, 2))
    runs, tree = trees(setting, data, size)
    flat = losses(setting, data, size)
    figures = {
        "likelihood": of_likelihood(runs),
        "leaves": of_leaves(tree, data, ("temp", "humidity", "windspeed")),
    }
    return Results(data.about, [*runs, *flat], [*of_trees(runs), *of_losses(flat)], figures)


if __name__ == "__main__":
    main()
