"""V-MoE: patches of images choose experts, and the patches that matter least are left out.

Run from the repository root as `python -m examples.v_moe`. A dense vision transformer and two
V-MoEs of its active size are trained on real digits. Then the room of experts is cut, with the
weights as they are, once in the order of tokens and once by batch prioritised routing (BPR).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from examples.classifiers import (
    AT_ONCE,
    ROWS,
    Recipe,
    better,
    data_sets,
    judged,
    refused,
    same_weights,
    spec,
    trained,
    verdict,
)
from examples.data.dataset import Dataset
from examples.data.images import patches
from examples.harness import About, Claim, Results, Run, Setting, command
from examples.harness.results import by_data, final_mean
from examples.plot import canvas

ABOUT = About(
    "v_moe",
    "V-MoE and batch prioritised routing",
    "Riquelme et al. 2021, Scaling Vision with Sparse Mixture of Experts",
    "Sparse experts work for images as they do for text. And images forgive: most patches say "
    "little. If patches go to experts by their routing weight, highest first, the room of experts "
    "can be cut far below one place a patch, after training, and what is left out is background. "
    "The cost of a trained model became a dial.",
)
SYSTEMS = {"ViT": "vit-{}", "V-MoE, every 2": "vmoe-{}", "V-MoE, last 1": "vmoe-{}-last-1"}
SWEPT = "V-MoE, every 2"
RATIOS = (0.1, 0.2, 0.3, 0.5, 0.75, 1.05)
ORDERS = {"BPR": "confidence", "vanilla": "rank"}
LOW, HALF = 0.2, 0.5  # ratios that claims and pictures are about
CLOSE = 0.01  # of accuracy: what is called as good


def measure(ratio: float, order: str) -> str:
    """The name of a note: accuracy with so much room, first come by this order."""
    return f"accuracy at {ratio:g}, {order}"


def with_room(model: Any, source: Any, ratio: float, order: str) -> Any:
    """The trained model with other room in evaluation: `ratio` places a token."""
    room = {"eval_factor": ratio, "multiple": 1, "priority": ORDERS[order]}
    return same_weights(
        model, source, {f"model.moe.capacity.{key}": value for key, value in room.items()}
    )


def sweep(runs: Sequence[tuple[Run, Any]], source: Any, data: Dataset, ratios: Any) -> None:
    """Note the accuracy of each trained model at each ratio and order."""
    for order in ORDERS:
        for ratio in ratios:
            one = with_room(runs[0][1], source, ratio, order)
            for run, model in runs:
                one.load_state_dict(model.state_dict())
                run.notes[measure(ratio, order)] = judged(one, data.held_out)["accuracy"]


def blank(images: Tensor) -> Tensor:
    """Which patches [N, 16] have no ink at all."""
    return patches(images, images.shape[-1] // 4).sum(-1) == 0


def background(model: Any, images: Tensor) -> tuple[float, float]:
    """Share left out of the patches without ink, and of those with ink, over routed layers."""
    parts = [refused(model, part)[:, :, 1:] for part in torch.split(images, AT_ONCE)]
    out, empty = torch.cat(parts, 1).double(), blank(images)
    return float(out[:, empty].mean()), float(out[:, ~empty].mean())


# Figures


def of_room(runs: Sequence[Run], ratios: Sequence[float]) -> Any:
    """Accuracy over the room of experts, a panel for each set of images."""
    groups = by_data(runs)
    figure = canvas(4.8 * len(groups), 3.6)
    if figure is None:
        return None
    for axes, (on, found) in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
    ):
        swept, dense = ([r for r in found if r.system == name] for name in (SWEPT, "ViT"))
        for order in ORDERS:
            values = [mean_note(swept, measure(ratio, order)) for ratio in ratios]
            axes.plot(ratios, values, "o-", label=order)
        axes.axhline(final_mean(dense, "accuracy"), color="gray", linestyle="--", label="ViT")
        axes.set(title=on, xlabel="places of experts a patch (C)", ylabel="held-out accuracy")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def of_patches(models: Sequence[tuple[str, Any]], images: Tensor, shown: int) -> Any:
    """Images with the patches that the last mixture left out in white, a row for each model."""
    figure = canvas(1.1 * shown, 1.25 * (len(models) + 1))
    if figure is None:
        return None
    grid = figure.subplots(len(models) + 1, shown, squeeze=False)
    size = images.shape[-1] // 4
    rows = [("all patches", torch.zeros(len(images), 4, 4))]
    rows += [
        (name, refused(one, images)[-1, :, 1:].double().reshape(-1, 4, 4)) for name, one in models
    ]
    for line, (name, out) in zip(grid, rows, strict=True):
        mask = out.repeat_interleave(size, 1).repeat_interleave(size, 2)
        for axes, image, hidden in zip(line, images[:shown, 0], mask[:shown], strict=True):
            pixels = torch.maximum(0.8 * image, hidden.to(image)).tolist()
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize="x-small")
    return figure


# Claims


def mean_note(runs: Sequence[Run], name: str) -> float:
    """A note, the mean over seeds."""
    return sum(run.notes[name] for run in runs) / len(runs)


def claims(runs: Sequence[Run], ratios: Sequence[float]) -> list[Claim]:
    """The paper's, for each set of images, beside what was seen."""
    found = []
    for on, same in by_data(runs).items():
        of = {name: [run for run in same if run.system == name] for name in SYSTEMS}
        means = {name: final_mean(part, "accuracy") for name, part in of.items()}
        found += [*compared(on, of), *prioritised(on, of[SWEPT], means["ViT"], ratios)]
    return found


def compared(on: str, of: Mapping[str, Sequence[Run]]) -> list[Claim]:
    """Sparse against dense, and few sparse layers against many."""
    dense, every, last = of.values()
    seen, holds = better(every, dense)
    few, many = (final_mean(runs, "accuracy") for runs in (last, every))
    return [
        Claim(f"a V-MoE is better than a ViT of its active size ({on})", seen, holds),
        Claim(
            f"experts in the last layers alone are about as good as in every second ({on})",
            f"accuracy {few:.4f} against {many:.4f}; within {CLOSE} is called as good",
            few > many - CLOSE,
        ),
    ]


def prioritised(on: str, runs: Sequence[Run], dense: float, ratios: Sequence[float]) -> list[Claim]:
    """What BPR does to a trained model."""
    values = {o: [mean_note(runs, measure(r, o)) for r in ratios] for o in ORDERS}
    low = min(ratios, key=lambda ratio: abs(ratio - LOW))
    place = list(ratios).index(low)
    enough = {
        o: next((r for r, v in zip(ratios, values[o], strict=True) if v >= dense), None)
        for o in ORDERS
    }
    said = {o: "at none" if ratio is None else f"from C = {ratio:g}" for o, ratio in enough.items()}
    empty, inked = (mean_note(runs, f"left out at {HALF:g}, {p}") for p in ("no ink", "ink"))
    rows = runs[0].notes[ROWS] * len(runs)
    words, clear = verdict(dense, values["vanilla"][0], rows)
    seen, much = ([values[order][at] for order in ORDERS] for at in (place, -1))
    return [
        Claim(
            f"with little room, BPR is far better than the order of tokens ({on})",
            *at_room(low, *verdict(seen[0], seen[1], rows)),
        ),
        Claim(
            f"with BPR, 15 to 30% of the places are enough to be as good as the dense model ({on})",
            f"as good as the ViT {said['BPR']} with BPR, {said['vanilla']} without; the ViT and "
            f"the least room without BPR: {words}",
            enough["BPR"] is not None and enough["BPR"] <= 0.3 if clear is not None else None,
        ),
        Claim(
            f"even with much room BPR is better ({on})",
            *at_room(ratios[-1], *verdict(much[0], much[1], rows)),
        ),
        Claim(
            f"what is left out is background ({on})",
            f"C = {HALF:g}: {empty:.0%} of the patches without ink are left out, {inked:.0%} of "
            "those with ink",
            empty > inked,
        ),
    ]


def at_room(ratio: float, words: str, holds: bool | None) -> tuple[str, bool | None]:
    """A comparison of BPR with the order of tokens, with the room that both had."""
    return f"C = {ratio:g}: accuracy with and without BPR {words}", holds


@command(ABOUT, seeds=3)
def main(setting: Setting) -> Results:
    """Train all systems, then cut the room of experts."""
    recipe = Recipe(setting(800, 12), 32, 3e-3, evaluations=setting(5, 2))
    ratios = setting(RATIOS, RATIOS[1:2])
    runs, about, figures = [], [], {}
    for on, (end, data) in data_sets(setting).items():
        about.append(data.about)
        kept = []
        for system, name in SYSTEMS.items():
            for seed in setting.all_seeds:
                made = trained(setting, spec(name.format(end)), (system, seed, on), data, recipe)
                runs.append(made[0])
                kept += [made] * (system == SWEPT)
        source = spec(SYSTEMS[SWEPT].format(end))
        sweep(kept, source, data, ratios)
        half, low = (with_room(kept[0][1], source, ratio, "BPR") for ratio in (HALF, LOW))
        images = data.held_out.x
        for run, model in kept:
            half.load_state_dict(model.state_dict())
            values = background(half, images)
            for what, value in zip(("no ink", "ink"), values, strict=True):
                run.notes[f"left out at {HALF:g}, {what}"] = value
        half.load_state_dict(kept[0][1].state_dict())
        rows = [(f"C = {HALF:g}", half), (f"C = {LOW:g}", low)]
        figures[f"patches-{end}"] = of_patches(rows, images[:AT_ONCE], setting(10, 4))
    figures["room"] = of_room(runs, ratios)
    return Results("; ".join(about), runs, claims(runs, ratios), figures)


if __name__ == "__main__":
    main()
