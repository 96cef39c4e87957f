"""Worked cases of two choices a token: second-choice policies and capacity (reference B8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from worked_numbers import Case, Draws, Layer, gates, same, tensor, worked

FIRST = {"balance": {"weight": 1.0, "count": "first"}}


def top2(
    case: Case, second: dict[str, Any] | None, capacity: Any, gate: Any = "sum", **rest: Any
) -> Layer:
    """Two choices of four experts, run on the case's logits in training."""
    select: dict[str, Any] = {"k": 2, **({"second": second} if second else {})}
    router = {"select": select, "gate": gate}
    layer = gates(router, 4, capacity=capacity, losses=FIRST, **rest)
    uniform = case.inputs.get("uniform", case.inputs.get("rnd"))
    draws = Draws(rand_like=tensor(uniform)) if uniform else Draws()
    with draws:
        layer.run(case["logits"])
    return layer


def holds_top2(case: Case, layer: Layer, out: Tensor) -> None:
    """Everything that the cases of GShard's family expect."""
    chosen = layer.result("top_k")
    scores = layer.calls["masked_mean"][0].args[0]
    slots, routing = layer.slots(), layer.routing
    case.holds(probs=scores, index_1=chosen[:, 0], index_2=chosen[:, 1], combine=out)
    case.holds(slot_1=slots[:, 0], slot_2=slots[:, 1])
    fraction, mean = layer.calls["balance_loss"][0].args
    case.holds(f_top1=fraction, P_mean=mean, aux_loss=routing.losses["balance"])
    late = layer.calls.get("kept_weights")
    weights = late[0].args[0] if late else layer.calls["combine"][0].args[2]
    case.holds(gate_1=weights[:, 0], gate_2=weights[:, 1])
    wanted = layer.result("skip_choices") if "skip_choices" in layer.calls else chosen
    case.holds(second_attempted=wanted[:, 1] < 4)


def check(case: Case, second: dict[str, Any] | None, gate: Any = "sum") -> None:
    capacity = {"slots": case.params["capacity"]}
    layer = top2(case, second, capacity, gate)
    holds_top2(case, layer, out_of(layer))


def out_of(layer: Layer) -> Tensor:
    """The combine weights of the last run, from what restored them."""
    return layer.result("combine")  # type: ignore[no-any-return]


def policy(case: Case) -> dict[str, Any]:
    """Second choices by the case's parameters, the same in evaluation."""
    name = case.params["second_policy"]
    threshold = case.params.get("threshold")
    known = {"threshold": threshold} if threshold else {}
    return {"policy": name, "eval_policy": name, **known}


@worked("gshard-top2-random-mtf")
def test_random_seconds_of_gshard(case: Case) -> None:
    check(case, policy(case))


@worked("gshard-top2-random-thr0p2")
def test_random_seconds_of_mesh_tensorflow(case: Case) -> None:
    check(case, policy(case))


@worked("gshard-top2-threshold")
def test_seconds_above_a_threshold(case: Case) -> None:
    check(case, policy(case))


@worked("gshard-top2-none")
def test_no_seconds_leave_the_first_gate_as_it_is(case: Case) -> None:
    check(case, policy(case))


@worked("gshard-top2-all")
def test_all_seconds(case: Case) -> None:
    check(case, None)


@worked("gshard-top2-all-renorm-after")
def test_gates_of_what_was_not_dropped(case: Case) -> None:
    assert case.params["renormalise"] == "after_drop"
    check(case, None, {"normalize": "sum", "after_drop": True})


@worked("gshard-paper-algorithm")
def test_skipped_seconds_take_up_room_in_the_printed_algorithm(case: Case) -> None:
    second = {"policy": "random", "threshold": 0.5, "takes_slot": True}
    layer = top2(case, second, {"slots": case.params["capacity"]})
    chosen, wanted = layer.result("top_k"), layer.result("skip_choices")
    slots = torch.where(wanted < 4, layer.slots(), -1)
    case.holds(combine=out_of(layer), slot_1=slots[:, 0], slot_2=slots[:, 1])
    case.holds(counter_final=layer.routing.load)
    case.holds(counter_after_first=torch.bincount(chosen[:, 0], minlength=4))
    loss = layer.routing.losses["balance"]
    case.holds(aux_loss_times_E2=loss, aux_loss_paper=loss / 4**2)


@worked("gshard-second-sampling-gumbel")
def test_seconds_are_drawn_by_gumbel_noise(case: Case) -> None:
    layer = gates({"select": {"k": 2, "second": "sampling"}}, 4)
    with Draws(exponential_=(-case["gumbel"]).exp()):
        layer.run(case["logits"])
    case.holds(first_second=layer.result("sample_second"))


@worked("fairseq-random-second-raw-vs-normalised")
def test_seconds_are_judged_before_or_after_the_gates_are_shares(case: Case) -> None:
    second = {"policy": "random", "threshold": 0.5}
    for name, late in (("raw", True), ("normalised", False)):
        layer = top2(case, second, {"slots": 8}, {"normalize": "sum", "after_drop": late})
        call = layer.calls["skip_choices"][0]
        same(call.args[1][:, 1], case.want(f"{name}_g2"))
        same(call.result[:, 1] < 4, case.want(f"accept_{name}"))


@worked("second-expert-probability")
def test_how_likely_a_second_choice_is_kept(case: Case) -> None:
    second = case["g2"]
    experts = torch.tensor([[0, 1]]).expand(len(second), -1)
    weights = torch.stack((1 - second, second), 1)
    for threshold in case.inputs["thresholds"]:
        expected = case.want("probability")[f"{threshold}"]
        select = {"k": 2, "second": {"policy": "random", "threshold": threshold}}
        layer = gates({"select": select}, 4)
        layer.run(torch.zeros(2, 4, dtype=torch.float64))
        _, _, policies, limit, nowhere, training = layer.calls["skip_choices"][0].args
        for kept, draw in ((True, -1e-9), (False, 1e-9)):
            # Just below the probability a uniform draw keeps the choice, just above it does not.
            with Draws(rand_like=tensor(expected) + draw):
                made = layer.ops.skip_choices(experts, weights, policies, limit, nowhere, training)
            asked = tensor(expected) > 0 if kept else tensor(expected) < 1
            assert ((made[:, 1] == 1) == kept)[asked].all()
