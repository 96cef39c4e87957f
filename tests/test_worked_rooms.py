"""Worked cases of how many slots an expert has (reference 2.5), and of what fills them (B24)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from worked_numbers import Case, Layer, gates, one_hot, same, worked

from moegen.arch.moe import MoE
from moegen.arch.setting import Setting

Options = dict[str, Any]

# Every published formula as options of `capacity`, from the factor.
FORMULAS: dict[str, Callable[[float], Options]] = {
    "switch_meshtf": lambda cf: {"factor": cf, "at_most_tokens": True, "minimum": 4},
    "flaxformer": lambda cf: {"factor": cf, "rounding": "nearest", "minimum": 4},
    "vmoe_tokens_choose": lambda cf: {
        "factor": cf,
        "convention": "per_choice",
        "rounding": "ceil",
        "multiple": 4,
    },
    "vmoe_paper_round": lambda cf: {
        "factor": cf,
        "convention": "per_choice",
        "rounding": "nearest",
    },
    # No slots are replaced by four, and so is one by the multiple.
    "lingvo_auto": lambda cf: {"factor": cf, "minimum": 1, "multiple": 4},
    "praxis_auto": lambda cf: {"factor": cf, "minimum": 1, "multiple": 4, "multiple_above": 1},
    "fairseq_top2_train": lambda _: {"factor": 2.0, "round_first": "share_up"},
    "fairseq_top1_train": lambda cf: {"factor": cf, "round_first": "share_up"},
    "fairseq_eval_fraction_0p25": lambda cf: {"factor": cf, "eval_share": 0.25},
    "fastmoe_gshard": lambda cf: {
        "factor": cf,
        "convention": "per_choice",
        "round_first": "tokens_up",
    },
    "fastmoe_switch": lambda cf: {"factor": cf, "rounding": "ceil"},
    "tutel": lambda cf: {"factor": cf, "convention": "per_rank", "round_first": "share_up"},
    "megablocks_dropping": lambda cf: {"factor": cf, "convention": "per_choice"},
    "colossalai": lambda cf: {
        "factor": cf,
        "convention": "per_choice",
        "multiple": 2,
        "minimum": 4,
    },
    # Slots of a soft layer are parameters, so a spec gives this number as select.slots.
    "soft_moe_slots": lambda cf: {"factor": cf, "rounding": "nearest", "minimum": 1},
    "t2t_local_moe_tpu": lambda cf: {"factor": 2 * cf, "at_most_tokens": True},
}

CHOICE: dict[str, Callable[[float], Options]] = {
    "expert_choice_paper": lambda cf: {"kind": "expert_choice", "factor": cf},
    "praxis_expert_choice_v1": lambda cf: {
        "kind": "expert_choice",
        "factor": cf,
        "round_first": "share_down",
    },
}

NO_FORMULA = {
    "switch_paper_float": "the paper's text has a real number of slots, which is rounded in code",
    "base_exact": "an assignment, not a capacity: selection `balanced` shares all tokens out",
}


def mixture(formula: str, experts: int, k: int, factor: float) -> Options:
    """A mixture by a formula."""
    held: Options = {"experts": {"count": experts, "width": 1, "activation": "relu", "bias": True}}
    if formula in CHOICE:
        return {**held, "router": {"select": CHOICE[formula](factor)}}
    return {**held, "router": {"select": k}, "capacity": FORMULAS[formula](factor)}


def room_of(formula: str, tokens: int, experts: int, k: int, factor: float) -> int:
    """Slots by the very methods that are traced, on numbers."""
    moe: Any = MoE.model_validate(mixture(formula, experts, k, factor))
    if formula in CHOICE:
        return int(moe.router.select.slots(moe, tokens))
    return Setting(None, moe, 1, tokens).room(training="eval" not in formula)


@worked("capacity-formulas")
def test_every_published_formula(case: Case) -> None:
    rows = case.want("rows")
    assert [{k: v for k, v in row.items() if k != "capacity"} for row in rows] == (
        case.inputs["settings"]
    )
    for row in rows:
        formulas = set(FORMULAS) | set(CHOICE)
        assert formulas | set(NO_FORMULA) == set(row["capacity"])
        for formula in formulas:
            found = room_of(formula, row["S"], row["E"], row["k"], row["capacity_factor"])
            same(found, row["capacity"][formula], f"{formula} of {row}")


@pytest.mark.parametrize("formula", sorted({**FORMULAS, **CHOICE}))
def test_emitted_layers_have_the_room_of_their_formula(formula: str) -> None:
    rows = [r for r in Case("capacity-formulas").expected["rows"] if (r["E"], r["k"]) == (4, 2)]
    assert len(rows) == 2
    for row in rows:
        held = mixture(formula, 4, 2, row["capacity_factor"])
        layer = Layer(held, 4)
        layer.run(torch.randn(row["S"], 4, dtype=torch.float64), training="eval" not in formula)
        same(room(layer), row["capacity"][formula], formula)


def room(layer: Layer) -> int:
    """Slots of an expert in the last run."""
    if "best_tokens" in layer.calls:
        return int(layer.calls["best_tokens"][0].args[1])
    return int(layer.calls["refuse"][0].args[2])


@worked("vmoe-figure-capacity")
def test_the_figure_of_v_moe(case: Case) -> None:
    tokens, experts, factor = (case.inputs[name] for name in ("tokens", "experts", "C"))
    layer = gates({"select": case.inputs["k"]}, experts, capacity=V_MOE(factor))
    layer.run(torch.randn(tokens, experts, dtype=torch.float64))
    case.holds(buffer=room(layer), ratio=room(layer) / (tokens / experts))


V_MOE = FORMULAS["vmoe_tokens_choose"]


def skewed(tokens: int, busiest: int) -> Tensor:
    """Logits of four experts by which so many tokens have the first among their best two."""
    token = torch.arange(tokens)
    logits = torch.zeros(tokens, 4, dtype=torch.float64)
    logits[token, 1 + token % 3] = 2.0
    second = torch.where(token < busiest, 0, 1 + (token + 1) % 3)
    logits[token, second] = 1.0
    return logits


@worked("tutel-dynamic-capacity")
def test_a_dynamic_capacity_is_what_the_busiest_expert_takes(case: Case) -> None:
    # Nothing is padded to capacity here, so an expert has as many rows as it takes: without a
    # capacity the busiest has all its load, which is Tutel's factor 0, and with one the lesser of
    # its load and the bound, which is Tutel's factor below 0.
    logits = skewed(case.inputs["S"], case.inputs["max_load"])
    rows = []
    for factor in case.inputs["factors"]:
        capacity = FORMULAS["tutel"](abs(factor)) if factor else None
        layer = gates({"select": case.inputs["k"]}, case.inputs["E"], capacity=capacity)
        layer.run(logits)
        _, ends = layer.result("sort_by_expert")
        assert layer.routing.load.max() == case.inputs["max_load"]
        rows.append(ends.diff(prepend=ends[:1] * 0).max())
        assert factor <= 0 or rows[-1] == room(layer)
    case.holds(capacity=torch.stack(rows))


BLOCKS = "block-sparse rows are those of a kernel; the emitted grouped product pads nothing"


@worked(
    "megablocks-topology",
    padded_tokens_per_expert=BLOCKS,
    padded_bins=BLOCKS,
    block_rows=BLOCKS,
    row_offsets=BLOCKS,
    column_indices=BLOCKS,
    matrix_shape=BLOCKS,
    nonzero_blocks=BLOCKS,
)
def test_rows_are_sorted_by_expert(case: Case) -> None:
    experts = case["expert_of_assignment"]
    layer = gates({"select": 1}, 4)
    layer.run(one_hot(experts.tolist(), 4))
    order, ends = layer.result("sort_by_expert")
    case.holds(sorted_indices=order, bin_ids=experts[order], bins=ends)
    case.holds(tokens_per_expert=layer.routing.load)


@worked(
    "megablocks-dropless-vs-capacity",
    dropless_padding_to_block4=BLOCKS,
)
def test_dropless_against_capacity(case: Case) -> None:
    logits = one_hot(case.inputs["expert_of_assignment"], 4)
    rows = []
    for row in case.want("rows"):
        capacity = FORMULAS["megablocks_dropping"](row["cf"])
        layer = gates({"select": 1}, 4, capacity=capacity)
        layer.run(logits)
        dropped = round(layer.routing.dropped.item() * len(logits))
        _, ends = layer.result("sort_by_expert")
        assert ends[-1] == len(logits) - dropped
        padding = room(layer) * 4 - int(ends[-1])
        found = {"cf": row["cf"], "capacity": room(layer), "dropped": dropped}
        rows.append({**found, "padding": padding})
    same(rows, case.want("rows"))
    free = gates({"select": 1}, 4)
    free.run(logits)
    assert free.routing.dropped == 0
