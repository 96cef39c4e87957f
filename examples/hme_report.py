"""What `examples.hme` tells: the papers' claims beside what was seen, and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from examples.data.dataset import Dataset
from examples.harness import Claim, Run
from examples.harness.metrics import evaluating, spread
from examples.harness.results import by_name, final_mean
from examples.plot import canvas

EM, DESCENT, ADAM, BATCHES = "tree, EM", "tree, descent", "tree, Adam", "tree, Adam by batches"
LINEAR, NETWORK = "one linear expert", "one network"
OBJECTIVES = ("cooperative", "competitive", "mixture")
FEWER = 5  # times: what is called far fewer passes
CLOSE = 0.02  # of R2: what is called as good


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
    reached = f"after {needed}" if needed else f"not after {em[0].held_out[-1][0]}"
    seconds = [sum(run.seconds for run in runs) / len(runs) for runs in (em, other)]
    return Claim(
        f"EM needs far fewer passes over the rows than a gradient ({what})",
        f"{system} is at {level:.3f} nats of training after {passes} passes, EM {reached} "
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


def said(values: Mapping[str, float]) -> str:
    """Numbers with what they are of."""
    return ", ".join(f"{value:.3f} ({name})" for name, value in values.items())


def of_losses(runs: Sequence[Run]) -> list[Claim]:
    """What Jacobs and the others claim, beside what was seen."""
    of = {name: [run for run in runs if run.system == name] for name in OBJECTIVES}
    means = {
        measure: {name: final_mean(part, measure) for name, part in of.items()}
        for measure in ("R2", "R2 of one expert", "gate entropy", "nats")
    }
    alone, entropy, blend = means["R2 of one expert"], means["gate entropy"], means["R2"]
    together, compete, mixture = OBJECTIVES

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
            f"R2 {said({name: blend[name] for name in (compete, mixture)})}; nats "
            f"{said({name: means['nats'][name] for name in (compete, mixture)})}; by R2",
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
            system = part[0].system
            if system == LINEAR:
                axes.axhline(part[0].final[measure], color="gray", linestyle="--", label=system)
                continue
            points = [list(zip(*run.held_out, strict=True)) for run in part]
            mean = [
                spread([v[measure] for v in vs])[0]
                for vs in zip(*(p[1] for p in points), strict=True)
            ]
            axes.plot(points[0][0][1:], mean[1:], "o-", markersize=3, label=system)
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
