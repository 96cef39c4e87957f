"""Experts that are no networks: a mixture of Gaussian processes, on real tables.

Run from the repository root as `python -m examples.gaussian_processes`. Every expert is a Gaussian
process over its own rows, with its own smoothness and noise; a gate (multinomial logistic
regression) says how likely an expert is for a row. Gate, experts and assignment are found in
turns: a row goes to the expert under which it is likeliest, its own vote left out.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from examples.data.dataset import Dataset, Part
from examples.data.needed import needed
from examples.data.tables import bikes, diabetes
from examples.harness import About, Claim, Results, Run, Setting, command
from examples.harness.fit import bar, shares_over_steps
from examples.harness.metrics import r2
from examples.harness.results import final_mean
from examples.svm_mixture import assign, capacity

Array = NDArray[np.float64]

ABOUT = About(
    "gaussian_processes",
    "A mixture of Gaussian processes",
    "Tresp 2000, Mixtures of Gaussian Processes; Rasmussen and Ghahramani 2002, Infinite Mixtures "
    "of Gaussian Process Experts",
    "A gate can join any models that give a density. One Gaussian process has one smoothness and "
    "one noise everywhere and costs the cube of its rows; experts over parts of the rows differ in "
    "both and cost far less. A mixture also says how sure it is, row by row, and where two answers "
    "are likely it gives both.",
)
ROUNDS = 4  # times that rows are assigned
LEARNED_FROM = 250  # rows at most, of a process, that its length scales and noise are learned from


def moments(gate: Array, mean: Array, variance: Array) -> tuple[Array, Array]:
    """Mean and variance [N] of a mixture: gate, mean and variance of its experts [N, M]."""
    middle = (gate * mean).sum(-1)
    return middle, (gate * (variance + mean**2)).sum(-1) - middle**2


def log_densities(mean: Array, variance: Array, y: Array) -> Array:
    """Log-density of y [N] under each expert [N, M]."""
    off = (y[:, None] - mean) ** 2 / variance
    log: Array = -(off + np.log(2 * math.pi * variance)) / 2
    return log


def log_density(gate: Array, mean: Array, variance: Array, y: Array) -> Array:
    """Log-density of y [N] under the mixture [N]."""
    parts = np.log(gate) + log_densities(mean, variance, y)
    return np.asarray(np.logaddexp.reduce(parts, axis=-1))


def responsibilities(gate: Array, mean: Array, variance: Array, y: Array) -> Array:
    """How likely each expert is once y [N] is known: [N, M], rows sum to 1."""
    parts = np.log(gate) + log_densities(mean, variance, y)
    return np.asarray(np.exp(parts - np.logaddexp.reduce(parts, axis=-1, keepdims=True)))


@dataclass
class Expert:
    """A Gaussian process over rows of its own, standardised by their mean and deviation."""

    process: Any
    shift: float
    scale: float

    @classmethod
    def of(cls, x: Array, y: Array, learned_from: int = LEARNED_FROM) -> Expert:
        """Condition on rows [N, D]; length scales and noise are learned from the first so many."""
        gp, kernels = needed("sklearn.gaussian_process"), needed("sklearn.gaussian_process.kernels")
        shift, scale = float(y.mean()), float(y.std()) or 1.0
        kernel = kernels.ConstantKernel() * kernels.RBF(2.0 * np.ones(x.shape[1]), (0.1, 1e4))
        kernel += kernels.WhiteKernel(0.5, (1e-4, 10.0))
        learned = gp.GaussianProcessRegressor(kernel, alpha=1e-6)
        scaled = (y - shift) / scale
        with warnings.catch_warnings():  # length scales at their bounds: a feature that is ignored
            warnings.simplefilter("ignore", needed("sklearn.exceptions").ConvergenceWarning)
            learned.fit(x[:learned_from], scaled[:learned_from])
        if learned_from < len(x):
            learned = gp.GaussianProcessRegressor(learned.kernel_, alpha=1e-6, optimizer=None)
            learned.fit(x, scaled)
        return cls(learned, shift, scale)

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Mean and variance, noise included, of y for rows [N, D]."""
        mean, deviation = self.process.predict(x, return_std=True)
        return mean * self.scale + self.shift, (deviation * self.scale) ** 2

    def without_itself(self, y: Array) -> tuple[Array, Array]:
        """Mean and variance for each of its own rows, given only the others.

        Rasmussen and Williams 2006, equations 5.10 to 5.12.
        """
        solve = needed("scipy.linalg").cho_solve
        inverse = np.diag(solve((self.process.L_, True), np.eye(len(y))))
        scaled = (y - self.shift) / self.scale - self.process.alpha_ / inverse
        return scaled * self.scale + self.shift, self.scale**2 / inverse


@dataclass
class Mixture:
    """A gate and its experts."""

    gate: Any
    experts: Sequence[Expert]

    @classmethod
    def of(cls, x: Array, y: Array, part: Array) -> Mixture:
        """Given the expert of each row [N]."""
        gate = needed("sklearn.linear_model").LogisticRegression(max_iter=1000).fit(x, part)
        parts = [part == expert for expert in range(int(part.max()) + 1)]
        return cls(gate, [Expert.of(x[rows], y[rows]) for rows in parts])

    def experts_of(self, x: Array) -> tuple[Array, Array, Array]:
        """Gate, means and variances [N, M] for rows [N, D]."""
        said = [expert.predict(x) for expert in self.experts]
        mean, variance = (np.stack(values, -1) for values in zip(*said, strict=True))
        return self.gate.predict_proba(x), mean, variance

    def likeliest(self, x: Array, y: Array, part: Array) -> Array:
        """How much each expert wants each of the rows it was made from: log-densities [N, M]."""
        gate, mean, variance = self.experts_of(x)
        for number, expert in enumerate(self.experts):
            rows = part == number
            mean[rows, number], variance[rows, number] = expert.without_itself(y[rows])
        return np.asarray(np.log(gate) + log_densities(mean, variance, y))


def measured(gate: Array, mean: Array, variance: Array, y: Array) -> dict[str, float]:
    """R² of the mixture's mean, and the negative log-density of y, in nats a row."""
    middle, _ = moments(gate, mean, variance)
    density = log_density(gate, mean, variance, y)
    return {"R2": r2(torch.from_numpy(middle), torch.from_numpy(y)), "nats": -float(density.mean())}


def arrays(part: Part) -> tuple[Array, Array]:
    """Rows and labels for scikit-learn."""
    return part.x.double().numpy(), part.y.double().numpy()


def mixture(data: Dataset, experts: int, seed: int, setting: Setting) -> Run:
    """From clusters of rows to experts, and from there to rows assigned anew."""
    run = Run(f"{experts} processes", seed, data.name)
    (x, y), (x_held_out, y_held_out) = arrays(data.train), arrays(data.held_out)
    room = capacity(len(x), experts, len(x) // (2 * experts))
    started = time.perf_counter()
    clusters = needed("sklearn.cluster").KMeans(experts, n_init=4, random_state=seed).fit(x)
    far = torch.from_numpy(clusters.transform(x))
    part, loads = assign(-far, room).numpy(), []
    with bar(setting.console) as progress:
        task = progress.add_task(run.name, total=ROUNDS)
        for number in range(1, ROUNDS + 1):
            made = Mixture.of(x, y, part)
            run.measure(number, measured(*made.experts_of(x_held_out), y_held_out))
            loads.append(torch.bincount(torch.from_numpy(part), minlength=experts))
            part = assign(torch.from_numpy(made.likeliest(x, y, part)), room).numpy()
            progress.advance(task)
    run.seconds = time.perf_counter() - started
    run.loads.append(shares_over_steps("experts", [*range(1, ROUNDS + 1)], torch.stack(loads)))
    return run


def single(data: Dataset, rows: int, what: str, seed: int) -> Run:
    """One process on so many rows."""
    run = Run(what, seed, data.name)
    (x, y), (x_held_out, y_held_out) = arrays(data.train.first(rows)), arrays(data.held_out)
    started = time.perf_counter()
    one = Expert.of(x, y)
    run.seconds = time.perf_counter() - started
    mean, variance = (values[:, None] for values in one.predict(x_held_out))
    run.measure(ROUNDS, measured(np.ones_like(mean), mean, variance, y_held_out))
    return run


def studied(data: Dataset, experts: int, setting: Setting) -> list[list[Run]]:
    """The mixture, one process on all rows, and one that costs what one expert does."""
    share = len(data.train) // experts
    mixtures = [mixture(data, experts, seed, setting) for seed in setting.all_seeds]
    whole = single(data, len(data.train), "one, all rows", setting.seed)
    small = single(data, share, "one, an expert's share", setting.seed)
    return [mixtures, [whole], [small]]


def claims(name: str, runs: Sequence[Sequence[Run]]) -> list[Claim]:
    """What the papers expect of a mixture, beside what was seen on one table."""
    ours, whole, small = ([final_mean(group, n) for n in ("R2", "nats")] for group in runs)
    seconds = [group[0].seconds for group in runs]
    return [
        Claim(
            f"{name}: experts of their own noise and smoothness know better how sure they are than "
            "one process does",
            f"{ours[1]:.3f} nats a row against {whole[1]:.3f}",
            ours[1] < whole[1],
        ),
        Claim(
            f"{name}: their mean is nearer, too",
            f"R² {ours[0]:.3f} against {whole[0]:.3f}",
            ours[0] > whole[0],
        ),
        Claim(
            f"{name}: all rows are used, though no process is larger than an expert",
            f"{ours[1]:.3f} nats against {small[1]:.3f} of one process with an expert's share; but "
            f"{seconds[0]:.0f} s for {ROUNDS} rounds, {seconds[1]:.0f} s for one with all rows",
            ours[1] < small[1],
        ),
    ]


@command(ABOUT, seeds=3)
def main(setting: Setting) -> Results:
    """A table whose noise depends on the row, and a small one where there is little to divide."""
    hours, patients = bikes().first(setting(3000, 200)), diabetes().first(setting(10**9, 120))
    found, said = [], []
    for data, experts in ((hours, setting(8, 2)), (patients, 2)):
        runs = studied(data, experts, setting)
        found += [run for group in runs for run in group]
        said += claims(data.name, runs)
    return Results(f"{hours.about}; {patients.about}", found, said)


if __name__ == "__main__":
    main()
