"""Soft MoE: experts work on averages of patches, so that none is chosen, dropped or idle.

Run from the repository root as `python -m examples.soft_moe`. A dense vision transformer, one whose
patches choose experts, one whose experts choose patches, and Soft MoE are trained on real digits;
all do as much work for an image. Then the same slots are divided among fewer and more experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.classifiers import (
    ROWS,
    Recipe,
    better,
    data_sets,
    neighbours,
    spec,
    trained,
    unseen,
    verdict,
)
from examples.data.dataset import Dataset
from examples.harness import About, Claim, Results, Run, Setting, command
from examples.harness.results import by_data, final_mean
from examples.plot import canvas

ABOUT = About(
    "soft_moe",
    "Soft MoE",
    "Puigcerver et al. 2024, From Sparse to Soft Mixtures of Experts",
    "Routing need not be a choice. Each slot of an expert is a weighted mean of all patches of an "
    "image, and each patch gets a weighted mean of all slots, so everything has a gradient, loads "
    "are even without a loss, nothing is dropped, and an image's result does not depend on its "
    "neighbours. The price is that every patch sees all others, so it is not for decoders.",
)
SYSTEMS = {
    "ViT": "vit-{}-average",
    "Tokens Choice": "tokens-choice-{}",
    "Experts Choice": "experts-choice-{}",
    "Soft MoE": "softmoe-{}",
}
SLOTS = 16  # of an image, in all: as many as patches
EXPERTS = (1, 4, 16)  # beside the 8 of the specs
PROBED = 32  # images whose tokens are followed
SAME = 1e-3  # a change of a logit that rounding may make


def division(experts: int) -> str:
    """The name of a Soft MoE with so many experts."""
    return f"Soft MoE, {experts} x {SLOTS // experts}"


def divided(experts: int) -> dict[str, Any]:
    """The same number of slots among so many experts."""
    return {
        "model.moe.experts.count": experts,
        "model.moe.router.select.slots": SLOTS // experts,
    }


def of_division(runs: Sequence[Run]) -> Any:
    """Accuracy over the number of experts, with the same slots in all, a line for each data set."""
    lines = {on: experts_to_accuracy(found) for on, found in by_data(runs).items()}
    lines = {on: means for on, means in lines.items() if len(means) > 1}
    figure = canvas(4.8, 3.6) if lines else None
    if figure is None:
        return None
    axes = figure.subplots()
    for on, means in lines.items():
        axes.plot(list(means), list(means.values()), "o-", label=on)
    axes.set(xlabel=f"experts ({SLOTS} slots in all)", ylabel="held-out accuracy")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def experts_to_accuracy(runs: Sequence[Run]) -> dict[int, float]:
    """Mean accuracy for each number of experts, of runs on one data set."""
    found = {}
    for experts in sorted({*EXPERTS, 8}):
        name = "Soft MoE" if experts == 8 else division(experts)
        same = [run for run in runs if run.system == name]
        if same:
            found[experts] = final_mean(same, "accuracy")
    return found


def claims(runs: Sequence[Run]) -> list[Claim]:
    """The paper's, for each set of images, beside what was seen."""
    found = []
    for on, same in by_data(runs).items():
        of = {name: [run for run in same if run.system == name] for name in SYSTEMS}
        rows = of["ViT"][0].notes[ROWS] * len(of["ViT"])
        found += [*compared(on, of), *followed(on, of), *grown(on, experts_to_accuracy(same), rows)]
    return found


def compared(on: str, of: dict[str, list[Run]]) -> list[Claim]:
    """Soft against dense and against both choices."""
    dense, tokens, experts, soft = of.values()
    return [
        Claim(f"Soft MoE is better than {what} ({on})", *better(soft, others))
        for what, others in (
            ("a ViT of the same work", dense),
            ("Tokens Choice", tokens),
            ("Experts Choice", experts),
        )
    ]


def followed(on: str, of: dict[str, list[Run]]) -> list[Claim]:
    """Which tokens have a say, and who an image depends on."""
    lost = {name: mean_note(of[name], "unseen") for name in list(SYSTEMS)[1:]}
    moved = {name: mean_note(of[name], "neighbours") for name in list(SYSTEMS)[1:]}
    others = ("Tokens Choice", "Experts Choice")
    return [
        Claim(
            f"every token contributes, while choices leave some out ({on})",
            "tokens that no expert sees: "
            + ", ".join(f"{share:.1%} with {name}" for name, share in lost.items()),
            lost["Soft MoE"] == 0 and all(lost[name] > 0 for name in others),
        ),
        Claim(
            f"an image's result does not depend on the others of its batch ({on})",
            "largest change of a logit when images are judged alone: "
            + ", ".join(f"{change:.2g} with {name}" for name, change in moved.items()),
            moved["Soft MoE"] < SAME and all(moved[name] > SAME for name in others),
        ),
    ]


def grown(on: str, accuracy: dict[int, float], rows: float) -> list[Claim]:
    """More experts with the same slots; rows: how many each accuracy is a share of."""
    if len(accuracy) < 2:
        return []
    words, holds = verdict(accuracy[max(accuracy)], accuracy[min(accuracy)], rows)
    all_of_them = ", ".join(f"{value:.4f} with {count}" for count, value in accuracy.items())
    return [
        Claim(
            f"with the same slots in all, more experts are better, at about the same cost ({on})",
            f"accuracy {all_of_them}; most against fewest: {words}",
            holds,
        )
    ]


def mean_note(runs: Sequence[Run], name: str) -> float:
    """A note, the mean over seeds."""
    return sum(run.notes[name] for run in runs) / len(runs)


@dataclass(frozen=True)
class Task:
    """One set of images to train on: `on` in records, the end of its specs' names, and itself."""

    setting: Setting
    recipe: Recipe
    on: str
    end: str
    data: Dataset

    def runs(self, system: str, name: str, change: Mapping[str, Any]) -> Iterator[Run]:
        """A system trained with every seed, and its tokens followed."""
        images = self.data.held_out.x[: self.setting(PROBED, 4)]
        soft = system.startswith("Soft")
        for seed in self.setting.all_seeds:
            run, model = trained(
                self.setting,
                spec(name.format(self.end)),
                (system, seed, self.on),
                self.data,
                self.recipe,
                overrides=change,
                shares=soft,
            )
            if system != "ViT":
                run.notes["unseen"] = unseen(model, images)
                run.notes["neighbours"] = neighbours(model, images)
            if seed != self.setting.seed:
                run.loads.clear()  # one picture of each system is enough
            yield run


@command(ABOUT, seeds=2)
def main(setting: Setting) -> Results:
    """Train all systems, follow their tokens, and divide the slots anew."""
    recipe = Recipe(setting(600, 12), 32, 3e-3, setting(5, 2))
    runs: list[Run] = []
    about = []
    for on, (end, data) in data_sets(setting).items():
        about.append(data.about)
        task = Task(setting, recipe, on, end, data)
        for system, name in SYSTEMS.items():
            runs += task.runs(system, name, {})
        for experts in EXPERTS if on != "digits" else ():
            runs += task.runs(division(experts), SYSTEMS["Soft MoE"], divided(experts))
    return Results("; ".join(about), runs, claims(runs), {"experts": of_division(runs)})


if __name__ == "__main__":
    main()
