"""GMoE: sparse vision transformers on domains that training never saw.

Run from the repository root as `python -m examples.gmoe`. Digits of MNIST are turned by angles;
four angles are trained on, and two beyond them, on either side, are judged. A dense vision
transformer and GMoE of the same active size learn by plain minimisation of the mean error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.classifiers import AT_ONCE, ROWS, Recipe, judged, spec, trained, verdict
from examples.data.dataset import Dataset, Part
from examples.data.images import mnist_5k
from examples.harness import About, Claim, Results, Run, Setting, command
from examples.harness.metrics import evaluating
from examples.harness.results import by_name
from examples.plot import canvas

ABOUT = About(
    "gmoe",
    "GMoE, domain generalisation",
    "Li et al. 2023, Sparse Mixture-of-Experts are Domain Generalizable Learners",
    "An architecture can do for unseen domains what special losses were made for. If experts are "
    "chosen by what a patch looks like, an attribute that is known from other domains meets the "
    "experts that know it. Two mixtures late in a vision transformer, trained with no thought of "
    "domains at all, were better than methods made for them.",
)
SYSTEMS = {"ViT": "vit-mnist-6", "GMoE": "gmoe-mnist"}
SEEN, UNSEEN = (15, 30, 45, 60), (0, 75)  # degrees


def turned(images: Tensor, degrees: Tensor) -> Tensor:
    """Images [N, 1, H, W], each turned about its middle by its own angle [N], to the left."""
    angle = degrees * math.pi / 180
    zero = torch.zeros_like(angle)
    rows = [torch.stack((angle.cos(), -angle.sin(), zero), -1)]
    rows.append(torch.stack((angle.sin(), angle.cos(), zero), -1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def all_at(part: Part, degrees: int) -> Part:
    """A domain: all images turned by one angle."""
    return Part(turned(part.x, torch.full((len(part),), float(degrees))), part.y)


def domains(data: Dataset) -> tuple[Dataset, dict[int, Part]]:
    """Images to learn from and to be judged by, each of one of the angles seen; and all domains.

    Every image is at one angle alone, so that there are no more of them than before.
    """

    def mixed(part: Part) -> Part:
        angles = torch.tensor(SEEN, dtype=torch.float32)[torch.arange(len(part)) % len(SEEN)]
        return Part(turned(part.x, angles), part.y)

    every = {degrees: all_at(data.held_out, degrees) for degrees in sorted((*SEEN, *UNSEEN))}
    return replace(data, train=mixed(data.train), held_out=mixed(data.held_out)), every


def on_domain(degrees: int) -> str:
    """The name of a note."""
    return f"accuracy at {degrees} degrees"


def loads(model: Any, every: dict[int, Part]) -> Tensor:
    """Choices [domains, E] of each expert of the last mixture."""
    found = []
    with evaluating(model):
        for part in every.values():
            outs = [model(chunk.x).routing[-1].load for chunk in part.chunks(AT_ONCE)]
            found.append(torch.stack(outs).sum(0))
    return torch.stack(found)


def of_domains(runs: Sequence[Run], shares: Tensor | None) -> Any:
    """Accuracy on every domain; and which experts it went to."""
    figure = canvas(9.0, 3.6)
    if figure is None or shares is None:
        return None
    left, right = figure.subplots(1, 2)
    angles = sorted((*SEEN, *UNSEEN))
    for system, same in by_name(runs).items():
        left.plot(angles, [mean_note(same, on_domain(a)) for a in angles], "o-", label=system)
    left.axvspan(min(SEEN), max(SEEN), color="gray", alpha=0.15, label="seen in training")
    left.set(xlabel="degrees", ylabel="held-out accuracy")
    left.legend(fontsize="x-small")
    even = shares / shares.sum(-1, keepdim=True)
    image = right.imshow(even.T.tolist(), aspect="auto", cmap="viridis")
    right.set(xticks=range(len(angles)), yticks=range(shares.shape[-1]), ylabel="expert")
    right.set(xticklabels=angles, xlabel="degrees", title="last mixture: share of a domain")
    figure.colorbar(image, ax=right)
    return figure


def claims(runs: Sequence[Run]) -> list[Claim]:
    """The paper's, beside what was seen."""
    of = by_name(runs)
    dense, sparse = (of[name] for name in SYSTEMS)
    found = []
    for what, angles in (("domains that training never saw", UNSEEN), ("domains seen", SEEN)):
        theirs, ours = (
            sum(mean_note(same, on_domain(a)) for a in angles) / len(angles)
            for same in (dense, sparse)
        )
        each = ", ".join(
            f"{mean_note(sparse, on_domain(a)):.4f} against {mean_note(dense, on_domain(a)):.4f} "
            f"at {a} degrees"
            for a in angles
        )
        words, holds = verdict(ours, theirs, sparse[0].notes[ROWS] * len(sparse) * len(angles))
        paper = f"GMoE is better than a ViT of the same work on {what}"
        found.append(Claim(paper, f"accuracy {words} ({each})", holds))
    return found


def mean_note(runs: Sequence[Run], name: str) -> float:
    """A note, the mean over seeds."""
    return sum(run.notes[name] for run in runs) / len(runs)


@command(ABOUT, seeds=2)
def main(setting: Setting) -> Results:
    """Train both on the angles seen, judge them on all."""
    data, every = domains(mnist_5k().first(setting(10**6, 64)))
    recipe = Recipe(setting(500, 4), 32, 3e-3, setting(5, 2))
    runs, shares = [], None
    for system, name in SYSTEMS.items():
        for seed in setting.all_seeds:
            run, model = trained(setting, spec(name), (system, seed, ""), data, recipe)
            for degrees, part in every.items():
                run.notes[on_domain(degrees)] = judged(model, part)["accuracy"]
            runs.append(run)
            if system == "GMoE" and shares is None:
                shares = loads(model, every)
    about = f"{data.about}, turned by {', '.join(map(str, SEEN))} degrees"
    return Results(about, runs, claims(runs), {"domains": of_domains(runs, shares)})


if __name__ == "__main__":
    main()
