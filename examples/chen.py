"""Why mixtures work: experts find clusters that no single network can tell apart.

Run from the repository root as `python -m examples.chen`. Rows are made of four patches: one says
the label in a direction of the row's cluster, one says which cluster it is, one misleads, one is
noise. Mixtures of cubic and of linear experts are trained, and single experts of their active
size, by the paper's method: every expert's gradient is divided by its own norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.data.synthetic import Patches, clustered_patches
from examples.harness import About, Claim, Results, Run, Schedule, Setting, command, compiled, fit
from examples.harness.metrics import dispatch_entropy, evaluating, spread
from examples.harness.results import by_data, by_name, final_mean
from examples.plot import canvas

ABOUT = About(
    "chen",
    "Towards understanding the mixture-of-experts layer",
    "Chen, Deng, Wu, Gu and Li 2022, Towards Understanding Mixture of Experts in Deep Learning",
    "On data with clusters a single expert fails however it is trained, while a mixture of "
    "nonlinear experts finds the clusters, though nobody names them, and each expert takes some. "
    "With linear experts the mixture gains less: the nonlinearity of experts and the structure of "
    "the data explain the gain together.",
)
SPECS = Path(__file__).parent.parent / "specs"
FIRST = "model.layers.0"
ALONE = {f"{FIRST}.experts.count": 1, f"{FIRST}.experts.hidden": [24], f"{FIRST}.router": {}}
CUBIC, LINEAR = "8 cubic experts", "8 linear experts"
SINGLES = ("1 cubic expert", "1 linear expert")
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    CUBIC: ("chen2022-cubic", {}),
    LINEAR: ("chen2022-linear", {}),
    SINGLES[0]: ("chen2022-cubic", ALONE),
    SINGLES[1]: ("chen2022-linear", ALONE),
}
WIDE = "1 cubic expert, 8 times as wide"
SETTINGS = {"noise 1/√d": 1.0, "noise 2/√d": 2.0}  # by the deviation of the patch of noise
RATE = 1e-3  # of experts; the router's is 100 times that, as the spec says
RANDOM = 1.386  # ln 4: the entropy of four clusters for an expert that does not tell them apart
IDLE = 0.01  # an expert with less of the rows takes no part
CLEAR = 0.2  # of RANDOM: an entropy below that is called specialised, one above the rest is not

Table = Tensor  # [E, K], rows of cluster k that expert e was given


class NormalisedDescent(torch.optim.SGD):
    """Gradient descent in which every expert moves equally far, whatever its gradient's norm."""

    def __init__(self, model: Any, rate: float) -> None:
        super().__init__(model.parameter_groups(lr=rate))
        self.model = model

    def step(self, closure: Any = None) -> Any:
        """Divide, then descend."""
        self.model.normalise_gradients()
        return super().step(closure)


@dataclass(frozen=True)
class Size:
    """How many rows, and steps on all of them."""

    rows: int
    steps: int
    evaluations: int


@dataclass
class Seen:
    """What one mixture did with clusters: tables of experts and clusters, by step."""

    run: Run
    tables: list[Table]


def dispatched(model: Any, rows: Patches) -> Table:
    """How many rows of each cluster each expert is given [E, K], in evaluation."""
    clusters = int(rows.cluster.max()) + 1
    with evaluating(model):
        loads = [
            model(rows.x[rows.cluster == cluster]).routing[0].load for cluster in range(clusters)
        ]
    return torch.stack(loads, -1)


def trained(
    setting: Setting, system: tuple[str, int, str], source: Any, data: Any, size: Size
) -> Seen:
    """One system: its record, and its tables if there is anything to choose."""
    name, seed, on = system
    spec, overrides = source
    made = compiled(SPECS / f"{spec}.yaml", overrides, seed=seed, batch=size.rows)
    model, (train, held_out) = made.model, data
    torch.manual_seed(seed)  # the noise of choices is drawn from here on
    seen = Seen(made.run(name, seed, on), [])

    def measured() -> dict[str, float]:
        with evaluating(model):
            right = model.classify(held_out.x) == (held_out.y > 0)
        values = {"accuracy": right.double().mean().item()}
        if not overrides:
            seen.tables.append(dispatched(model, held_out))
            values["dispatch entropy"] = dispatch_entropy(seen.tables[-1])
        return values

    fit(
        seen.run,
        model,
        repeat(train.part()),
        lambda part: model.training_loss(part.x, part.y),
        measured,
        Schedule(size.steps, evaluations=size.evaluations, clip=float("inf")),
        setting.console,
        shares=lambda out: {} if overrides else {"experts": out.routing[0].load},
        adam=NormalisedDescent(model, RATE),
    )
    if not overrides:
        load = seen.tables[-1].sum(-1).double()
        seen.run.notes["experts in use"] = float((load > IDLE * load.sum()).sum())
    return seen


# Figures


def of_clusters(found: Sequence[Seen]) -> Any:
    """Which expert was given which cluster, over the training: a row for each mixture."""
    figure = canvas(9.6, 2.9 * len(found))
    if figure is None:
        return None
    grid = figure.subplots(len(found), 4, squeeze=False)
    for line, seen in zip(grid, found, strict=True):
        last = len(seen.tables) - 1
        for axes, place in zip(line, (0, 1, last // 2, last), strict=True):
            table = seen.tables[place].double()
            share = table / table.sum(0).clamp(min=1)
            axes.imshow(share.tolist(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axes.set(title=f"step {seen.run.held_out[place][0]}", xlabel="cluster")
            axes.set(xticks=range(table.shape[1]), yticks=range(table.shape[0]))
        line[0].set_ylabel(f"expert\n{seen.run.system}", fontsize="small")
    figure.suptitle(f"share of each cluster's rows, {found[0].run.on}", fontsize="medium")
    return figure


def of_training(runs: Sequence[Run]) -> Any:
    """Accuracy and entropy over the training, a column for each setting."""
    groups = by_data(runs)
    figure = canvas(4.8 * len(groups), 6.4)
    if figure is None:
        return None
    grid = figure.subplots(2, len(groups), squeeze=False)
    for column, (on, same) in enumerate(groups.items()):
        for axes, measure in zip(grid[:, column], ("accuracy", "dispatch entropy"), strict=True):
            for part in by_name(same).values():
                if measure in part[0].final:
                    steps = [step for step, _ in part[0].held_out]
                    values = [
                        spread([run.held_out[i][1][measure] for run in part])
                        for i in range(len(steps))
                    ]
                    mean, deviation = zip(*values, strict=True)
                    axes.errorbar(steps, mean, deviation, capsize=2, label=part[0].system)
            axes.set(title=on, xlabel="step", ylabel=f"held-out {measure}")
            axes.grid(alpha=0.3)
        grid[1, column].axhline(RANDOM, color="gray", linestyle="--", label="clusters mixed: ln 4")
    for axes in grid[:, 0]:  # all systems are in the first setting
        axes.legend(fontsize="x-small")
    return figure


# Claims


def claims(on: str, runs: Sequence[Run]) -> list[Claim]:
    """The paper's, for one setting, beside what was seen."""
    of = {name: [run for run in runs if run.system == name] for name in (*SYSTEMS, WIDE)}
    cubic, linear = (final_mean(of[name], "accuracy") for name in (CUBIC, LINEAR))
    single = {name: final_mean(of[name], "accuracy") for name in (*SINGLES, WIDE) if of[name]}
    sharp, mixed = (final_mean(of[name], "dispatch entropy") for name in (CUBIC, LINEAR))
    used = [run.notes["experts in use"] for run in of[CUBIC]]
    said = ", ".join(f"{value:.4f} ({name})" for name, value in single.items())
    return [
        Claim(
            f"a mixture of nonlinear experts learns what no single expert can ({on})",
            f"accuracy {cubic:.4f} against {said}",
            cubic > max(single.values()),
        ),
        Claim(
            f"a mixture of linear experts is worse than one of nonlinear experts ({on})",
            f"accuracy {linear:.4f} against {cubic:.4f}",
            linear < cubic,
        ),
        Claim(
            f"nonlinear experts specialise: the dispatch entropy falls to about 0 ({on})",
            f"{sharp:.3f} nats, of {RANDOM:.3f} without any order; below {CLEAR * RANDOM:.3f} is "
            "called specialised",
            sharp < CLEAR * RANDOM,
        ),
        Claim(
            f"linear experts do not: the entropy stays near that of random dispatch ({on})",
            f"{mixed:.3f} nats; above {(1 - CLEAR) * RANDOM:.3f} is called near",
            mixed > (1 - CLEAR) * RANDOM,
        ),
        Claim(
            f"the mixture does not collapse into one expert ({on})",
            f"experts with more than {IDLE:.0%} of the rows: {min(used):.0f} at least, of 8",
            min(used) > 1,
        ),
    ]


@command(ABOUT, seeds=3)
def main(setting: Setting) -> Results:
    """Mixtures and single experts, on less noise and on more."""
    size = Size(setting(2000, 240), setting(500, 12), setting(9, 3))
    runs, figures = [], {}
    asked = list(SETTINGS.items())[: setting(2, 1)]
    for number, (on, noise) in enumerate(asked, 1):
        data = clustered_patches(size.rows, noise=noise, seed=setting.seed)
        shown = []
        for name, source in SYSTEMS.items():
            for seed in setting.all_seeds:
                seen = trained(setting, (name, seed, on), source, data, size)
                runs.append(seen.run)
                shown += [seen] * (bool(seen.tables) and seed == setting.seed)
        wide = {**ALONE, f"{FIRST}.experts.hidden": [24 * 8]}
        if number == 1:  # it takes longer than all others, and one setting tells enough
            source = ("chen2022-cubic", wide)
            runs.append(trained(setting, (WIDE, setting.seed, on), source, data, size).run)
        figures[f"dispatch-{number}"] = of_clusters(shown)
    figures["specialise"] = of_training(runs)
    about = (
        f"the patches of Chen et al. 2022, made here: {size.rows:,} rows of 4 clusters to learn "
        "from and as many held out, by which everything is measured"
    )
    found = [claim for on, same in by_data(runs).items() for claim in claims(on, same)]
    return Results(about, runs, found, figures)


if __name__ == "__main__":
    main()
