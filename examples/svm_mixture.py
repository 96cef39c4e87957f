"""Experts that are no networks: a parallel mixture of support vector machines, on real showers.

Run from the repository root as `python -m examples.svm_mixture`. Each of M machines learns one
part of the rows; a small network, the gater, weighs what they say: f(x) = tanh(Σ w_m(x) s_m(x)).
Then every row moves to the machine that the gater weighs most and that still has room, and all is
learned again. The bound on the rows of a machine is an early form of an expert's capacity.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples.data.dataset import Dataset, Part
from examples.data.needed import needed
from examples.data.tables import telescope
from examples.harness import About, Claim, Results, Run, Setting, command
from examples.harness.fit import bar, shares_over_steps
from examples.harness.metrics import auc
from examples.harness.results import final_mean

ABOUT = About(
    "svm_mixture",
    "A parallel mixture of support vector machines",
    "Collobert, Bengio and Bengio 2002, A Parallel Mixture of SVMs for Very Large Scale Problems",
    "Experts need not be networks, and a method whose cost grows with the square of the rows is "
    "affordable once the rows are divided among experts. The gater assigns them, under a bound on "
    "how many an expert takes; a row that finds it full goes to the next best. That bound is what "
    "is called an expert's capacity today.",
)
ROUNDS = 6  # times that rows are assigned
LINEAR = 1.3  # the largest power of the rows that is called "about linear"


@dataclass(frozen=True)
class Size:
    """How large: rows in all, machines, hidden units and steps of the gater."""

    rows: int
    experts: int = 8
    hidden: int = 64
    steps: int = 400


class Gater(nn.Module):
    """Weights of the machines [N, M] for rows [N, D]: one hidden layer."""

    def __init__(self, features: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Any real numbers, not a distribution: the paper's choice."""
        weights: Tensor = self.layers(x)
        return weights


def assign(preference: Tensor, capacity: int) -> Tensor:
    """Every row's expert [N]: of preference [N, M] the highest that still has room, row by row."""
    room = [capacity] * preference.shape[1]
    chosen = []
    for ranking in preference.argsort(dim=-1, descending=True, stable=True).tolist():
        expert = next(e for e in ranking if room[e])
        room[expert] -= 1
        chosen.append(expert)
    return torch.tensor(chosen)


def capacity(rows: int, experts: int, spare: int) -> int:
    """Rows that a machine takes at most: an even share, and some to spare."""
    return rows // experts + spare


def machine(rows: Part) -> Any:
    """A support vector machine with a Gaussian kernel; rows of one class alone make a constant."""
    labels = rows.y.numpy()
    if labels.min() == labels.max():
        return float(2 * labels[0] - 1)
    return needed("sklearn.svm").SVC(C=2.0, cache_size=500).fit(rows.x.numpy(), labels)


def scores(machines: Sequence[Any], x: Tensor) -> Tensor:
    """What every machine says of rows x [N, D]: [N, M], positive for class 1."""
    said = [
        torch.full((len(x),), m)
        if isinstance(m, float)
        else torch.from_numpy(m.decision_function(x.numpy())).float()
        for m in machines
    ]
    return torch.stack(said, -1)


def train_gater(gater: Gater, said: Tensor, part: Part, steps: int, draw: torch.Generator) -> None:
    """Descend the squared error of tanh(Σ w s) against labels of -1 and 1."""
    adam = torch.optim.Adam(gater.parameters(), lr=5e-3)
    for _ in range(steps):
        rows = torch.randint(len(part), (256,), generator=draw)
        out = torch.tanh((gater(part.x[rows]) * said[rows]).sum(-1))
        loss = (out - (2 * part.y[rows] - 1)).square().mean()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()


def measured(score: Tensor, y: Tensor) -> dict[str, float]:
    """Share of rows on the right side of 0, and the area under the curve."""
    right = (score > 0) == (y > 0.5)
    return {"accuracy": right.double().mean().item(), "AUC": auc(score, y)}


def vectors(machines: Sequence[Any]) -> int:
    """Support vectors in all: each is compared with every row that is judged."""
    return sum(0 if isinstance(m, float) else int(m.n_support_.sum()) for m in machines)


def mixture(data: Dataset, size: Size, seed: int, setting: Setting) -> tuple[Run, Run]:
    """The gated mixture after every round; and the first round's machines, weighed alike."""
    draw, train = setting.draw(seed), data.train.first(size.rows)
    torch.manual_seed(seed)
    gater = Gater(train.x.shape[1], size.hidden, size.experts)
    run = Run(f"{size.experts} SVMs with a gater", seed)
    uniform = Run(f"{size.experts} SVMs, mean", seed)
    room = capacity(len(train), size.experts, len(train) // (4 * size.experts))
    part = assign(torch.rand(len(train), size.experts, generator=draw), room)
    preferred = []
    started = time.perf_counter()
    with bar(setting.console) as progress:
        task = progress.add_task(run.name, total=ROUNDS)
        for number in range(1, ROUNDS + 1):
            parts = [(part == e).nonzero()[:, 0] for e in range(size.experts)]
            machines = [machine(train.rows(places)) for places in parts]
            said, judged = scores(machines, train.x), scores(machines, data.held_out.x)
            if number == 1:
                uniform.seconds = time.perf_counter() - started
                uniform.measure(1, measured(judged.mean(-1), data.held_out.y))
            train_gater(gater, said, train, size.steps, draw)
            with torch.no_grad():
                weights, preference = gater(data.held_out.x), gater(train.x)
            run.measure(number, measured((weights * judged).sum(-1), data.held_out.y))
            preferred.append(torch.bincount(preference.argmax(-1), minlength=size.experts))
            part = assign(preference, room)
            progress.advance(task)
    run.seconds = time.perf_counter() - started
    run.loads.append(shares_over_steps("gater", [*range(1, ROUNDS + 1)], torch.stack(preferred)))
    own = sum(parameter.numel() for parameter in gater.parameters())
    uniform.parameters = uniform.active = vectors(machines) * (train.x.shape[1] + 1)
    run.parameters = run.active = uniform.parameters + own
    return run, uniform


def single(data: Dataset, rows: int, system: str, seed: int) -> Run:
    """One machine on so many rows."""
    train, run = data.train.first(rows), Run(system, seed)
    started = time.perf_counter()
    one = machine(train)
    run.seconds = time.perf_counter() - started
    run.measure(ROUNDS, measured(scores([one], data.held_out.x)[:, 0], data.held_out.y))
    run.parameters = run.active = vectors([one]) * (train.x.shape[1] + 1)
    return run


def growth(few: Run, many: Run, ratio: float) -> float:
    """The power of the number of rows that the time grows with, from two numbers of rows."""
    return math.log(max(many.seconds, 1e-9) / max(few.seconds, 1e-9)) / math.log(ratio)


def claims(gated: list[Run], uniform: list[Run], whole: Run, powers: list[float]) -> list[Claim]:
    """The paper's, beside what was seen."""
    ours, mean = final_mean(gated, "accuracy"), final_mean(uniform, "accuracy")
    one = whole.final["accuracy"]
    first = sum(run.held_out[0][1]["accuracy"] for run in gated) / len(gated)
    return [
        Claim(
            "local machines and a gater err less than one machine on all rows",
            f"accuracy {ours:.4f} against {one:.4f}",
            ours > one,
        ),
        Claim(
            "without the gater, machines that are weighed alike are worse",
            f"accuracy {mean:.4f} against {ours:.4f}",
            mean < ours,
        ),
        Claim(
            "assigning rows again improves on the random parts of the first round",
            f"accuracy {first:.4f} after round 1, {ours:.4f} after round {ROUNDS}",
            ours > first,
        ),
        Claim(
            "with machines of a fixed number of rows, time grows about as the rows, and that of "
            "one machine about as their square",
            f"as rows^{powers[0]:.1f} and as rows^{powers[1]:.1f} over 4 times the rows; "
            f"{gated[0].seconds:.0f} s for {ROUNDS} rounds, {whole.seconds:.0f} s for one machine "
            "(to assign rows, all support vectors judge all of them)",
            powers[0] < LINEAR < powers[1],
        ),
    ]


@command(ABOUT, seeds=3)
def main(setting: Setting) -> Results:
    """Mixtures, one machine on all rows, and one on as many rows as one expert has."""
    needed("sklearn.svm")  # before any time is taken
    data = telescope().first(setting(10**9, 800))
    size = Size(len(data.train), steps=setting(400, 50))
    fewer = Size(size.rows // 4, size.experts // 4, steps=size.steps // 4)
    gated, uniform = [], []
    for seed in setting.all_seeds:
        weighed, alike = mixture(data, size, seed, setting)
        gated.append(weighed)
        uniform.append(alike)
    whole = single(data, size.rows, "one SVM, all rows", setting.seed)
    share = single(data, size.rows // size.experts, "one SVM, an expert's share", setting.seed)
    powers = [
        growth(mixture(data, fewer, setting.seed, setting)[0], gated[0], 4),
        growth(single(data, fewer.rows, "", setting.seed), whole, 4),
    ]
    runs = [*gated, *uniform, whole, share]
    return Results(data.about, runs, claims(gated, uniform, whole, powers))


if __name__ == "__main__":
    main()
