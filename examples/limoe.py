"""LIMoE: images and texts share experts, which sort themselves by modality.

Run from the repository root as `python -m examples.limoe`. Scenes of up to four handwritten digits
are learned together with their captions, by contrast alone: which caption is of which image? Then
digits that training never saw are classified by the captions "a zero" to "a nine".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from examples.classifiers import ROWS, better, refused, spec
from examples.data.captions import Captions, Pairs, captions
from examples.harness import About, Claim, Results, Run, Schedule, Setting, command, compiled, fit
from examples.harness.metrics import accuracy, evaluating
from examples.harness.results import by_name
from examples.plot import canvas

ABOUT = About(
    "limoe",
    "LIMoE, images and texts",
    "Mustafa et al. 2022, Multimodal Contrastive Learning with LIMoE",
    "One sparse tower can serve two modalities, and nobody has to say which expert is for which: "
    "they sort themselves. But texts are few among patches, and a loss that evens loads over all "
    "tokens does not see that they have all gone to one expert. Entropies told apart by modality, "
    "sure for each token of text and spread over experts on the whole, made it train.",
)
CELLS = 4  # digits of a scene at most, two by two
DENSE, FULL, PLAIN = "one dense tower", "LIMoE", "LIMoE, no entropy losses"
ENTROPIES = ("text_local", "text_global", "image_global")
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    DENSE: ("limoe-scenes-dense", {}),
    FULL: ("limoe-scenes", {}),
    PLAIN: ("limoe-scenes", {f"model.moe.losses.{name}.weight": 0.0 for name in ENTROPIES}),
}
AT_ONCE = 64  # pairs judged in one call
PURE = 0.9  # share of one modality in an expert's load, above which it is called that one's


def squares(images: Tensor) -> Tensor:
    """Scenes [N, 1, 8, 32] with their four cells two by two: [N, 1, 16, 16]."""
    return torch.cat(images.chunk(2, -1), -2)


def inputs(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """What a model is given: images, ids of captions, and which of these are real."""
    return squares(pairs.images), pairs.ids, pairs.valid


def chunks(pairs: Pairs) -> list[Pairs]:
    """All pairs, some at once."""
    return [pairs.rows(rows) for rows in torch.split(torch.arange(len(pairs)), AT_ONCE)]


# Held out


class Exam:
    """Scenes and single digits that training never saw."""

    def __init__(self, held_out: Captions, scenes: int, singles: int) -> None:
        self.scenes = held_out.sample(scenes, torch.Generator().manual_seed(0))
        every = held_out.singles()
        self.singles = every.rows(torch.arange(min(singles, len(every))))
        self.names, lengths = held_out.classes()
        self.real = torch.arange(self.names.shape[1]) < lengths.unsqueeze(-1)

    def zero_shot(self, model: Any) -> float:
        """Share of single digits whose caption is the most alike of the ten."""
        logits = []
        for part in chunks(self.singles):
            which = torch.arange(max(len(part), len(self.names))) % len(self.names)
            images = squares(part.images)[torch.arange(len(which)) % len(part)]
            out = model(images, self.names[which], self.real[which])
            logits.append(out.images[: len(part)] @ out.texts[: len(self.names)].T)
        return accuracy(torch.cat(logits), self.singles.content[:, 0])

    def found(self, model: Any) -> tuple[float, float]:
        """Contrastive loss, and the share of images whose nearest caption, of 64, is right."""
        losses, right = [], []
        for part in chunks(self.scenes):
            out = model(*inputs(part))
            nearest = part.content[out.logits.argmax(-1)]
            right.append((nearest == part.content).all(-1).double().mean())
            losses.append(model.loss(out.logits))
        return float(torch.stack(losses).mean()), float(torch.stack(right).mean())

    def judged(self, model: Any) -> dict[str, float]:
        """All measures."""
        with evaluating(model):
            nats, right = self.found(model)
            return {"zero-shot": self.zero_shot(model), "retrieval": right, "nats": nats}

    def loads(self, model: Any) -> Tensor:
        """Choices [routed layers, 2, E] of tokens of images and of texts."""
        with evaluating(model):
            outputs = [model(*inputs(part)) for part in chunks(self.scenes)]
        return torch.stack(
            [torch.stack([one.modality_load for one in out.routing]) for out in outputs]
        ).sum(0)

    def lost(self, model: Any) -> tuple[float, float]:
        """Share of the tokens of images, and of those of texts, that no expert had room for."""
        parts = chunks(self.scenes)
        out = torch.cat([refused(model, *inputs(part)) for part in parts], 1).double()
        patches = out.shape[-1] - self.names.shape[1]
        return float(out[:, :, :patches].mean()), float(out[:, :, patches:][:, self.valid].mean())

    @property
    def valid(self) -> Tensor:
        """The real tokens of the scenes' captions."""
        return self.scenes.valid


def sorted_by(loads: Tensor) -> dict[str, float]:
    """How experts are divided among modalities, from loads [layers, 2, E].

    pure: share of experts whose load is nearly all of one modality. image and text spread: experts
    that a modality uses, exp of the entropy of its loads.
    """
    shares = loads.double() / loads.sum(1, keepdim=True).clamp(min=1)
    used = loads.sum(1) > 0
    pure = (shares.amax(1) > PURE)[used].double().mean()
    own = loads.double() / loads.sum(-1, keepdim=True).clamp(min=1)
    spread = torch.special.entr(own).sum(-1).exp().mean(0)
    return {"pure": float(pure), "image spread": float(spread[0]), "text spread": float(spread[1])}


def of_modalities(loads: dict[str, Tensor]) -> Any:
    """Loads of experts by modality, over an even load: a row a system, a panel a layer."""
    layers = len(next(iter(loads.values())))
    figure = canvas(4.2 * layers, 2.0 * len(loads))
    if figure is None:
        return None
    grid = figure.subplots(len(loads), layers, squeeze=False)
    for row, (system, values) in zip(grid, loads.items(), strict=True):
        for number, (axes, one) in enumerate(zip(row, values.double(), strict=True)):
            images, texts = (one / one.sum(-1, keepdim=True)).tolist()
            axes.bar(range(len(images)), images, label="images")
            axes.bar(range(len(texts)), texts, bottom=images, label="texts")
            axes.set(title=f"{system}: mixture {number}", xlabel="expert", ylabel="share")
    grid[0][-1].legend(fontsize="x-small")
    return figure


# Claims


def claims(runs: Sequence[Run]) -> list[Claim]:
    """The paper's, beside what was seen."""
    of = by_name(runs)
    full, plain = (
        {name: mean_note(of[system], name) for name in of[system][0].notes}
        for system in (FULL, PLAIN)
    )
    return [
        Claim(
            "LIMoE is better than a dense tower of the same work at zero-shot classification",
            *better(of[FULL], of[DENSE], "zero-shot"),
        ),
        Claim(
            "it is better with the entropy losses than without",
            *better(of[FULL], of[PLAIN], "zero-shot"),
        ),
        Claim(
            "experts sort themselves by modality, though no loss tells which is for which",
            f"{full['pure']:.0%} of the experts have more than {PURE:.0%} of their load from one "
            f"modality; {plain['pure']:.0%} without the entropy losses",
            full["pure"] > 0.5,
        ),
        Claim(
            "without the entropy losses texts crowd on few experts, and lose their places",
            f"texts use {plain['text spread']:.1f} experts without and {full['text spread']:.1f} "
            f"with them; {plain['texts refused']:.1%} and {full['texts refused']:.1%} of their "
            "tokens find no room",
            plain["text spread"] < full["text spread"]
            and plain["texts refused"] > full["texts refused"],
        ),
    ]


def mean_note(runs: Sequence[Run], name: str) -> float:
    """A note, the mean over seeds."""
    return sum(run.notes[name] for run in runs) / len(runs)


def trained(setting: Setting, system: str, seed: int, train: Captions, exam: Exam) -> Any:
    """A system's record and its model."""
    name, changes = SYSTEMS[system]
    size = setting(32, 8)
    made = compiled(spec(name), changes, seed=seed, batch=size)
    model = made.model
    run = fit(
        made.run(system, seed),
        model,
        train.batches(size, setting.draw(seed)),
        lambda pairs: model.training_loss(*inputs(pairs)),
        lambda: exam.judged(model),
        Schedule(setting(600, 6), 3e-3, setting(5, 2)),
        setting.console,
    )
    return run, model


@command(ABOUT, seeds=1)
def main(setting: Setting) -> Results:
    """Train all systems, and see which experts serve whom."""
    train, held_out = captions(CELLS)
    exam = Exam(held_out, setting(512, 64), setting(10**6, 20))
    runs: list[Run] = []
    loads: dict[str, Tensor] = {}
    for system in SYSTEMS:
        for seed in setting.all_seeds:
            run, model = trained(setting, system, seed, train, exam)
            runs.append(run)
            run.notes[ROWS] = len(exam.singles)
            if system == DENSE:
                continue
            seen = exam.loads(model)
            loads.setdefault(system, seen)
            of_images, of_texts = exam.lost(model)
            run.notes |= sorted_by(seen)
            run.notes |= {"images refused": of_images, "texts refused": of_texts}
    about = (
        "scenes of up to four of 1,797 handwritten digits (UCI, CC BY 4.0; scikit-learn), 16 x 16, "
        'with captions such as "a two, an eight and a one"; scenes held out show digits held out'
    )
    return Results(about, runs, claims(runs), {"modalities": of_modalities(loads)})


if __name__ == "__main__":
    main()
