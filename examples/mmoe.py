"""One gate a task: people of a census judged on two questions, and tasks that are made alike.

Run from the repository root as `python -m examples.mmoe`. On the census of Adult a mixture with a
gate for each task (MMoE) is trained beside one with a single gate (OMoE), a shared bottom, and
networks that share nothing, all of one active size. Then come the paper's made tasks, whose
correlation is chosen: what is lost by sharing where tasks have nothing in common?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.data.dataset import Dataset, Part
from examples.data.synthetic import task_pair
from examples.data.tables import adult
from examples.harness import About, Claim, Results, Run, Schedule, Setting, command, compiled, fit
from examples.harness.metrics import auc, evaluating, spread
from examples.harness.results import by_data, by_name, final_mean
from examples.plot import canvas

ABOUT = About(
    "mmoe",
    "One gate a task",
    "Ma et al. 2018, Modeling Task Relationships in Multi-task Learning with Multi-gate "
    "Mixture-of-Experts",
    "Tasks that share a bottom network hurt each other when they have little in common. Experts "
    "that are shared, with a gate for each task, let tasks decide how much to share, at almost no "
    "cost in parameters.",
)
SPECS = Path(__file__).parent.parent / "specs"
MMOE, OMOE, SHARED, APART = "MMoE", "OMoE", "shared bottom", "a network a task"
BOTTOM = {"model.gates": "none", "model.mixture.experts.count": 1}
CENSUS: dict[str, dict[str, Any]] = {
    MMOE: {},
    OMOE: {"model.gates": "shared"},
    SHARED: {**BOTTOM, "model.mixture.width": 64},
}
HALF = 34  # width of a network for one task, so that both have the size of a shared one
MADE = {MMOE: "mmoe", OMOE: "omoe", SHARED: "shared-bottom"}
CORRELATIONS = (0.0, 0.5, 1.0)
PEOPLE = "census"
CLOSE = 0.05  # of a loss: what is called as good


@dataclass(frozen=True)
class Size:
    """How long all systems are trained."""

    steps: int
    batch: int
    rate: float = 3e-3
    evaluations: int = 9


@dataclass
class Trained:
    """A record with the model itself."""

    run: Run
    model: Any


def columns(tasks: Sequence[str], part: Part, binary: bool) -> dict[str, Tensor]:
    """Labels of each task, from y [N, T]: [N] of yes and no, or values [N, 1]."""
    return {t: part.y[:, i] if binary else part.y[:, i : i + 1] for i, t in enumerate(tasks)}


def judged(model: Any, part: Part, tasks: Sequence[str], binary: bool) -> dict[str, float]:
    """Area under the curve by task; or the sum of the tasks' squared errors."""
    with evaluating(model):
        said = model.predict(part.x)
    labels = columns(tasks, part, binary)
    if binary:
        return {f"AUC, {task}": auc(said[task].flatten(), labels[task]) for task in tasks}
    errors = [(said[task] - labels[task]).square().mean() for task in tasks]
    return {"loss": float(torch.stack(errors).sum())}


def gates_of(output: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
    """The mean weight of experts [E] at each gate; one gate is of all tasks, or there is none."""
    names = tasks if len(output.routing) == len(tasks) else ["gate"]
    return {name: one.probability for name, one in zip(names, output.routing, strict=False)}


def trained(
    setting: Setting,
    system: tuple[str, int, str],
    source: tuple[str, Mapping[str, Any]],
    data: Dataset,
    size: Size,
    binary: bool,
) -> Trained:
    """One system on data whose tasks are those of its spec."""
    spec, overrides = source
    name, seed, on = system
    made = compiled(SPECS / f"{spec}.yaml", overrides, seed=seed, batch=size.batch)
    model = made.model
    with evaluating(model):
        tasks = list(model(data.train.x[:2]).outputs)
    run = fit(
        made.run(name, seed, on),
        model,
        data.train.batches(size.batch, setting.draw(seed)),
        lambda part: model.training_loss(part.x, columns(tasks, part, binary)),
        lambda: judged(model, data.held_out, tasks, binary),
        Schedule(size.steps, size.rate, size.evaluations),
        setting.console,
        shares=lambda out: gates_of(out, tasks),
        adam=torch.optim.Adam(model.parameters(), lr=size.rate),
    )
    if name == MMOE:
        run.notes["distance of gates"] = distance(model, data.held_out.x, tasks)
    return Trained(run, model)


def weights(model: Any, x: Tensor, tasks: Sequence[str]) -> Tensor:
    """Gates [T, N, E] of an MMoE for rows x [N, D]."""
    with evaluating(model):
        return torch.stack([getattr(model, f"gate_{task}")(x)[0] for task in tasks])


def distance(model: Any, x: Tensor, tasks: Sequence[str]) -> float:
    """How far apart two gates are, mean over rows: 0 if they are equal, 1 if they share nothing."""
    first, second = weights(model, x, tasks)
    return float((first - second).abs().sum(-1).mean() / 2)


# The census


def apart(setting: Setting, seed: int, data: Dataset, size: Size) -> Run:
    """Two networks, each of half the size and for one task, as one record."""
    both = Run(APART, seed, PEOPLE, 0, 0, 0.0)
    parts = []
    for place, task in enumerate(("income", "single")):
        own = {**BOTTOM, "model.mixture.width": HALF, "model.tasks": {task: "binary"}}
        rows = Dataset(
            data.name,
            Part(data.train.x, data.train.y[:, place : place + 1]),
            Part(data.held_out.x, data.held_out.y[:, place : place + 1]),
            data.about,
        )
        system = (f"a network for {task}", seed, PEOPLE)
        parts.append(trained(setting, system, ("mmoe-census", own), rows, size, True).run)
    for run in parts:
        both.parameters = (both.parameters or 0) + (run.parameters or 0)
        both.active = (both.active or 0) + (run.active or 0)
        both.flops = (both.flops or 0) + (run.flops or 0)
        both.seconds += run.seconds
    first, second = (run.held_out for run in parts)
    for (step, one), (_, two) in zip(first, second, strict=True):
        both.measure(step, {**one, **two})
    losses = zip(*(run.loss for run in parts), strict=True)
    both.loss = [(step, one + two) for (step, one), (_, two) in losses]
    return both


def census(setting: Setting, size: Size, data: Dataset) -> tuple[list[Run], Any]:
    """All systems on the census; and one MMoE, to look into."""
    runs, kept = [], None
    for name, overrides in CENSUS.items():
        for seed in setting.all_seeds:
            source = ("mmoe-census", overrides)
            made = trained(setting, (name, seed, PEOPLE), source, data, size, True)
            runs.append(made.run)
            kept = made.model if name == MMOE and kept is None else kept
    runs += [apart(setting, seed, data, size) for seed in setting.all_seeds]
    return runs, kept


def of_people(runs: Sequence[Run]) -> list[Claim]:
    """What the paper claims of its census, beside what was seen."""
    measures = ("AUC, income", "AUC, single")
    means, sums = {}, {}
    for part in by_name(runs).values():
        system = part[0].system
        means[system] = [final_mean(part, measure) for measure in measures]
        sums[system] = spread([sum(run.final[name] for name in measures) for run in part])

    def said(names: Sequence[str]) -> str:
        each = (
            f"{means[name][0]:.4f} and {means[name][1]:.4f}, together {sums[name][0]:.4f} ± "
            f"{sums[name][1]:.4f} ({name})"
            for name in names
        )
        return "AUC " + "; ".join(each) + ". More than the larger deviation is called better"

    def better(name: str, other: str) -> bool:
        return sums[name][0] - sums[other][0] > max(sums[name][1], sums[other][1])

    away = final([run for run in runs if run.system == MMOE], "distance of gates")
    return [
        Claim(
            "a gate a task does better than one gate and than a shared bottom (census)",
            said((MMOE, OMOE, SHARED)),
            better(MMOE, OMOE) and better(MMOE, SHARED),
        ),
        Claim(
            "tasks gain by being learned together (census)",
            said((MMOE, APART)),
            better(MMOE, APART),
        ),
        Claim(
            "tasks weigh the shared experts differently (census)",
            f"{away:.2f} of a gate's weight is on other experts than the other gate's",
            away > CLOSE,
        ),
    ]


def of_gates(model: Any, data: Dataset, tasks: Sequence[str]) -> Any:
    """A heatmap: the mean weight of experts at each task's gate, by what is true of people."""
    figure = canvas(6, 3)
    if figure is None:
        return None
    found, y = weights(model, data.held_out.x, tasks), data.held_out.y
    rows = [
        (f"{task}, {word}", found[place, y[:, place] == value].mean(0))
        for place, task in enumerate(tasks)
        for value, word in ((1, "yes"), (0, "no"))
    ]
    axes = figure.subplots()
    image = axes.imshow(
        torch.stack([row for _, row in rows]).tolist(), vmin=0, cmap="viridis", aspect="auto"
    )
    axes.set(xlabel="expert", xticks=range(found.shape[-1]), title="weights of experts by task")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    figure.colorbar(image, ax=axes, label="mean weight")
    return figure


# Tasks that are made


def final(runs: Sequence[Run], note: str) -> float:
    """A note, the mean over seeds."""
    return sum(run.notes[note] for run in runs) / len(runs)


def made_tasks(setting: Setting, size: Size, rows: int, correlations: Any) -> list[Run]:
    """All systems at each correlation."""
    runs = []
    for correlation in correlations:
        data = task_pair(correlation, train=rows, held_out=rows // 10, seed=setting.seed)
        for name, spec in MADE.items():
            for seed in setting.all_seeds:
                system = (name, seed, f"correlation {correlation:g}")
                runs.append(trained(setting, system, (spec, {}), data, size, False).run)
    return runs


def of_tasks(runs: Sequence[Run]) -> list[Claim]:
    """What the paper claims of its made tasks, beside what was seen."""
    loss = {
        (part[0].system, part[0].on): final_mean(part, "loss") for part in by_name(runs).values()
    }
    names = list(dict.fromkeys(run.on for run in runs))
    low, high = names[0], names[-1]
    gap = {name: loss[name, low] / loss[name, high] - 1 for name in MADE}
    away = {
        on: final([r for r in runs if (r.system, r.on) == (MMOE, on)], "distance of gates")
        for on in (low, high)
    }
    one, two = loss[OMOE, high], loss[MMOE, high]
    wins = [on for on in names if max(loss[MMOE, on], loss[OMOE, on]) < loss[SHARED, on]]
    return [
        Claim(
            "a shared bottom loses where tasks have less in common",
            f"loss {loss[SHARED, low]:.3f} at {low}, {loss[SHARED, high]:.3f} at {high}",
            loss[SHARED, low] > loss[SHARED, high],
        ),
        Claim(
            "both mixtures are better than a shared bottom, however alike the tasks are",
            "; ".join(
                f"{on}: " + ", ".join(f"{loss[name, on]:.3f} ({name})" for name in MADE)
                for on in names
            ),
            len(wins) == len(names),
        ),
        Claim(
            f"for equal tasks one gate does as well as a gate each ({high})",
            f"loss {one:.3f} (OMoE), {two:.3f} (MMoE); up to {CLOSE:.0%} more is called as well",
            one < (1 + CLOSE) * two,
        ),
        Claim(
            f"for tasks that differ a gate each is better ({low})",
            f"loss {loss[MMOE, low]:.3f} (MMoE), {loss[OMOE, low]:.3f} (OMoE)",
            loss[MMOE, low] < loss[OMOE, low],
        ),
        Claim(
            "MMoE loses less than OMoE when tasks have nothing in common",
            f"from {high} to {low} the loss grows by {gap[MMOE]:.0%} (MMoE), {gap[OMOE]:.0%} "
            f"(OMoE), {gap[SHARED]:.0%} (shared bottom)",
            gap[MMOE] < gap[OMOE],
        ),
        Claim(
            "gates agree where tasks do, and part where they differ",
            f"distance of the two gates {away[high]:.2f} at {high}, {away[low]:.2f} at {low}",
            away[high] < away[low],
        ),
    ]


def of_correlation(runs: Sequence[Run]) -> Any:
    """Loss over the correlation of tasks, a line for each system."""
    figure = canvas(5.6, 3.8)
    if figure is None:
        return None
    axes = figure.subplots()
    for name in MADE:
        groups = by_data([run for run in runs if run.system == name])
        at = [float(on.split()[-1]) for on in groups]
        found = [spread([run.final["loss"] for run in part]) for part in groups.values()]
        mean, deviation = zip(*found, strict=True)
        axes.errorbar(at, mean, deviation, fmt="o-", capsize=3, label=name)
    axes.set(xlabel="correlation of the tasks' weights", ylabel="held-out loss, both tasks")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


@command(ABOUT, seeds=2)
def main(setting: Setting) -> Results:
    """The census, then tasks whose correlation is chosen."""
    people = adult().first(setting(10**9, 400))
    runs, model = census(setting, Size(setting(800, 12), 256, evaluations=setting(9, 2)), people)
    asked = setting(CORRELATIONS, CORRELATIONS[::2])
    size = Size(setting(2000, 12), 100, evaluations=setting(5, 2))
    made = made_tasks(setting, size, setting(100_000, 500), asked)
    about = f"{people.about}; and the synthetic pairs of tasks of Ma et al. 2018"
    figures = {
        "gates": of_gates(model, people, ("income", "single")),
        "correlation": of_correlation(made),
    }
    return Results(about, [*runs, *made], [*of_people(runs), *of_tasks(made)], figures)


if __name__ == "__main__":
    main()
