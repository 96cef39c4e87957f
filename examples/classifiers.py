"""Image classifiers made from specs and trained alike: what the examples on images share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moegen
from examples.data.dataset import Dataset, Part
from examples.data.images import digits, mnist_5k
from examples.harness import Run, Schedule, Setting, compiled, fit
from examples.harness.fit import Shares
from examples.harness.metrics import accuracy, evaluating, nats, predicted
from examples.harness.results import final_mean

SPECS = Path(__file__).parent.parent / "specs"
ROWS = "held-out rows"  # a note
AT_ONCE = 64  # images judged in one call: those that compete for the room of experts
DATA = {"MNIST": ("mnist", mnist_5k), "digits": ("digits", digits)}


@dataclass(frozen=True)
class Recipe:
    """How every classifier is trained."""

    steps: int
    batch: int = 32
    rate: float = 2e-3
    evaluations: int = 5


def spec(name: str) -> Path:
    """The file of a spec of this repository."""
    return SPECS / f"{name}.yaml"


def data_sets(setting: Setting) -> dict[str, tuple[str, Dataset]]:
    """What to train on, by the name to print: the end of its specs' names, and its images."""
    if setting.quick:
        return {"digits": ("digits", digits().first(160))}
    return {name: (end, load()) for name, (end, load) in DATA.items()}


def trained(
    setting: Setting,
    source: Any,
    run: tuple[str, int, str],
    data: Dataset,
    recipe: Recipe,
    *,
    overrides: Mapping[str, Any] | None = None,
    shares: bool = False,
) -> tuple[Run, Any]:
    """Train the model of a spec; its record and itself.

    run: system, seed and `on` of the record. shares: keep experts' mean scores in place of loads,
    which say nothing where every expert is always full.
    """
    system, seed, on = run
    made = compiled(source, overrides or {}, seed=seed, batch=recipe.batch)
    model = made.model
    batches = data.train.batches(recipe.batch, setting.draw(seed))
    schedule = Schedule(recipe.steps, recipe.rate, recipe.evaluations)
    record = fit(
        made.run(system, seed, on),
        model,
        batches,
        lambda part: model.training_loss(part.x, part.y),
        lambda: judged(model, data.held_out),
        schedule,
        setting.console,
        shares=scores_of(model) if shares else None,
    )
    record.notes[ROWS] = len(data.held_out)
    return record, model


def judged(model: nn.Module, part: Part) -> dict[str, float]:
    """Accuracy, and cross-entropy in nats an image."""
    logits = predicted(model, part, lambda out: out.logits, AT_ONCE)
    return {"accuracy": accuracy(logits, part.y), "nats": nats(logits, part.y)}


def scores_of(model: Any) -> Shares:
    """Mean scores of experts [E] in each routed layer, of an output."""
    names = [str(name) for name in model.routed_layers()]
    return lambda out: {name: one.probability for name, one in zip(names, out.routing, strict=True)}


def same_weights(model: nn.Module, source: Any, overrides: Mapping[str, Any]) -> Any:
    """A model of the same spec but for some values, with these weights, for evaluation."""
    other = moegen.module(moegen.plan(source, overrides)).Model()
    other.load_state_dict(model.state_dict())
    return other.eval()


def better(
    ours: Sequence[Run], theirs: Sequence[Run], measure: str = "accuracy"
) -> tuple[str, bool | None]:
    """Whether a share of held-out rows is larger, as `verdict` has it."""
    first, second = (final_mean(runs, measure) for runs in (ours, theirs))
    words, holds = verdict(first, second, ours[0].notes[ROWS] * min(len(ours), len(theirs)))
    return f"{measure} {words}", holds


def verdict(first: float, second: float, rows: float) -> tuple[str, bool | None]:
    """Whether one share of so many rows is larger than another, in words and as it holds.

    None if that may be chance: two standard errors of the difference, all rows being counted as
    drawn anew for each seed and model; since they are the same, it is rather less.
    """
    chance = 2 * math.sqrt((first * (1 - first) + second * (1 - second)) / rows)
    words = f"{first:.4f} against {second:.4f}; by chance up to {chance:.4f}"
    return words, first > second if abs(first - second) > chance else None


# What experts see


@contextmanager
def watched(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs [B, S, d] of every mixture that runs meanwhile, in order."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
        seen.append((given[0], out[0]))

    mixtures = [one for name, one in model.named_modules() if name.endswith(".moe")]
    hooks = [one.register_forward_hook(keep) for one in mixtures]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def refused(model: nn.Module, *given: Tensor) -> Tensor:
    """Tokens that got nothing from their mixture, in evaluation: [routed layers, B, S] bool.

    given: what the model is given, such as images [B, ...].
    """
    with watched(model) as seen, evaluating(model):
        model(*given)
    return torch.stack([(out == 0).all(-1) for _, out in seen])


def unseen(model: nn.Module, images: Tensor) -> float:
    """Share of tokens that no output of their mixture depends on, in evaluation.

    The gradient of a random sum of a mixture's outputs by such a token is exactly zero.
    """
    before = model.training
    model.eval()
    with watched(model) as seen:
        model(images)
    model.train(before)
    draw = torch.Generator().manual_seed(0)
    lost = []
    for tokens, out in seen:
        total = (out * torch.randn(out.shape, generator=draw)).sum()
        (slope,) = torch.autograd.grad(total, tokens, retain_graph=True)
        lost.append((slope == 0).all(-1).double().mean())
    return float(torch.stack(lost).mean())


def neighbours(model: nn.Module, images: Tensor) -> float:
    """The largest change of any logit of images [N, ...] when each is judged without the others."""
    with evaluating(model):
        together = model(images).logits
        alone = torch.cat([model(image.unsqueeze(0)).logits for image in images])
    return float((together - alone).abs().max())
