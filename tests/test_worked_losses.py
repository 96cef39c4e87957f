"""Worked cases of auxiliary losses and how they are reduced (reference 2.8, B10, B18, B25)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from worked_numbers import (
    Case,
    Layer,
    decoder,
    emitted,
    gates,
    one_hot,
    same,
    standing_in,
    tensor,
    worked,
)

SWITCH = {"select": 1}


def balance(count: str, **loss: Any) -> dict[str, Any]:
    return {"balance": {"weight": 1.0, "count": count, **loss}}


FIRST = balance("first")


def holds_balance(case: Case, layer: Layer) -> None:
    fraction, mean = layer.calls["balance_loss"][0].args
    case.holds(f=fraction, P=mean, loss=layer.routing.losses["balance"])


@worked("aux-loss-uniform")
def test_balance_is_one_where_all_is_even(case: Case) -> None:
    # What breaks the tie of even scores is far below their precision.
    probs, hint = case["probs"], one_hot(case.inputs["top1"], 4) * 1e-12
    layer = gates(SWITCH, 4, losses=FIRST)
    layer.run(probs.log() + hint)
    assert layer.result("top_k")[:, 0].tolist() == case.inputs["top1"]
    holds_balance(case, layer)


@worked("aux-loss-collapse")
def test_balance_is_the_number_of_experts_after_a_collapse(case: Case) -> None:
    layer = gates(SWITCH, 4, losses=FIRST)
    layer.run(case["probs"].log().clamp(min=-1e4))
    assert layer.result("top_k")[:, 0].tolist() == case.inputs["top1"]
    holds_balance(case, layer)


@worked("router-z-loss")
def test_z_loss(case: Case) -> None:
    layer = gates(SWITCH, 4, losses={"z": 0.001})
    logits = case["logits"]
    layer.run(logits)
    z = layer.routing.losses["z"]
    case.holds(z_loss=z, weighted_c_z_1e_3=z * 0.001)
    each = []
    for row in logits:
        layer.run(row.unsqueeze(0))
        each.append(layer.routing.losses["z"].sqrt())
    case.holds(logsumexp=torch.stack(each))


FLAXFORMER = "flaxformer counts padding as tokens whose logits are 0; padding counts nothing here"


@worked("router-z-loss-padding", flaxformer=FLAXFORMER)
def test_padding_has_no_z_loss(case: Case) -> None:
    layer = gates(SWITCH, 4, losses={"z": 0.001})
    layer.run(case["logits"], valid=case["nonpadding"].bool())
    case.holds(masked_mean=layer.routing.losses["z"])


@worked("router-z-loss-gradient")
def test_gradient_of_the_z_loss(case: Case) -> None:
    x = case["logits"].unsqueeze(0).requires_grad_()
    layer = gates(SWITCH, 3, losses={"z": 0.001})
    layer.run(x)
    layer.routing.losses["z"].backward()
    case.holds(grad=x.grad[0])


MESH = "Mesh-TensorFlow divides by the padded size of a group; here real tokens alone count"


@worked("aux-loss-padding-variants", mtf_switch=MESH, mtf_top2=MESH)
def test_padding_has_no_part_in_balance(case: Case) -> None:
    layer = gates(SWITCH, 4, losses=FIRST)
    layer.run(case["logits"], valid=case["nonpadding"].bool())
    case.holds(masked_mean_over_real_tokens=layer.routing.losses["balance"])


@worked("st-moe-pytorch-density-after-drop")
def test_density_before_or_after_capacity(case: Case) -> None:
    for name, density, late in (("paper", "paper", False), ("quirk", "after_drop", True)):
        losses = balance("first", after_capacity=late)
        layer = gates(SWITCH, 4, capacity={"slots": case.params["capacity"]}, losses=losses)
        layer.run(case["logits"])
        same(layer.routing.losses["balance"], case.want(f"loss_{name}"))
        fraction = layer.calls["balance_loss"][0].args[0]
        same(fraction, case.want(f"density_{density}"))


def model(moe: dict[str, Any], **whole: Any) -> Any:
    """An emitted model around a mixture of four experts."""
    held = {"experts": {"count": 4, "width": 1}, "router": {"select": 1}, **moe}
    return emitted(decoder(held, 4, **whole))


def total(package: Any, **given: Tensor) -> Tensor:
    """The training loss of a few tokens."""
    ids = torch.arange(6).unsqueeze(0)
    loss, _ = package.Model().training_loss(ids, None, **given)
    return loss  # type: ignore[no-any-return]


@worked("aux-layer-reduction")
def test_layers_are_summed_or_averaged(case: Case) -> None:
    for reduction in ("sum", "mean"):
        losses = {"balance": {"weight": case.inputs["coef"], "reduction": reduction}}
        package = model({"losses": losses}, layers=3)
        with standing_in(package, balance_loss=case.inputs["per_layer"], next_token_loss=0.0):
            same(total(package), case.want(f"{reduction}_weighted"))


@worked(
    "st-moe-total-loss",
    mesh_tf_effective="Mesh-TensorFlow multiplies one coefficient by the other; here each loss has "
    "its own",
)
def test_total_loss_of_st_moe(case: Case) -> None:
    package = model({"losses": {"balance": case.params["c_B"], "z": case.params["c_z"]}})
    values = {"balance_loss": case.inputs["L_B"], "z_loss": case.inputs["L_z"]}
    with standing_in(package, **values, next_token_loss=case.inputs["cross_entropy"]):
        case.holds(total=total(package))


@worked("fairseq-gate-loss-combination")
def test_total_loss_of_fairseq(case: Case) -> None:
    # fairseq sums over tokens where the emitted loss takes the mean.
    size = case.inputs["sample_size"]
    for reduction, name in (("sum", "sum"), ("mean", "average")):
        losses = {"balance": {"weight": case.inputs["wt"], "reduction": reduction}}
        package = model({"losses": losses}, layers=2)
        mean = case.inputs["nll_sum"] / size
        with standing_in(package, balance_loss=case.inputs["l_aux"], next_token_loss=mean):
            same(total(package) * size, case.want(name))


@worked("limoe-aux-average")
def test_losses_of_limoe_are_averaged_by_their_weights(case: Case) -> None:
    terms, coefficient = case.inputs["terms"], case.params["coef"]
    weight = coefficient / len(terms)
    text = {"weight": weight, "id": "modality", "of": 1}
    losses = {
        "importance": {"weight": weight, "of": "scores"},
        "load": {"weight": weight, "threshold": "kth"},
        "z": weight,
        "local_text": {"kind": "local_entropy", **text},
        "global_text": {"kind": "global_entropy", **text, "spread": 9.0},
        "global_image": {"kind": "global_entropy", **text, "of": 0, "spread": 20.0},
    }
    package = model({"router": {"select": 1, "noise": "gaussian"}, "losses": losses})
    variations, z, local, spread = terms[:2], terms[2], terms[3], terms[4:]
    with standing_in(
        package,
        cv_squared=variations,
        z_loss=z,
        local_entropy=local,
        global_entropy=spread,
        next_token_loss=0.0,
    ):
        loss = total(package, modality=torch.tensor([0]))
    case.holds(weighted=loss, average=loss / coefficient)


@worked("limoe-entropy-losses")
def test_entropies_of_each_modality(case: Case) -> None:
    parts = {"image": 0, "text": 1}
    losses: dict[str, Any] = {}
    for part, of in parts.items():
        own = {"weight": 1.0, "id": "modality", "of": of}
        spread = float(case.params[f"S_{part}"])
        losses[f"local_{part}"] = {"kind": "local_entropy", **own}
        losses[f"global_{part}"] = {"kind": "global_entropy", **own}
        losses[f"thresholded_{part}"] = {"kind": "global_entropy", **own, "spread": spread}
    layer = gates(SWITCH, 4, losses=losses)
    probs = [case[f"{part}_probs"] for part in parts]
    modality = torch.cat([torch.full((len(p),), i) for i, p in enumerate(probs)])
    layer.run(torch.cat(probs).log(), modality=modality)
    found = layer.routing.losses
    for part, of in parts.items():
        same(found[f"local_{part}"], case.want(f"local_{part}"))
        same(found[f"global_{part}"], case.want(f"global_loss_{part}"))
        same(-found[f"global_{part}"], case.want(f"global_entropy_{part}"))
        spread = case.params[f"S_{part}"]
        same(found[f"thresholded_{part}"], case.want(f"thresholded_{part}_S{spread}"))
        layer.run(torch.cat(probs).log(), valid=modality == of, modality=modality)
        same(layer.routing.probability, case.want(f"mean_{part}"))


@worked("modsquad-mutual-information")
def test_mutual_information_of_tasks_and_experts(case: Case) -> None:
    mass = case["task_expert_mass"]
    scores = mass / mass.sum(1, keepdim=True)  # both tasks have the same mass
    losses = {"mutual_information": {"weight": 1.0, "id": "task", "count": 2}}
    layer = gates({"select": 3}, 3, losses=losses)
    layer.run(scores.log().clamp(min=-1e4), task=torch.arange(2))
    loss, mixed = layer.routing.losses["mutual_information"], layer.result("dense_gates")
    case.holds(joint=mixed / mixed.sum(), loss=loss, mutual_information=-loss)


@worked("load-imbalance-metrics")
def test_statistics_of_a_load(case: Case) -> None:
    load = case["load"]
    tokens = torch.repeat_interleave(torch.arange(4), load).tolist()
    layer = gates(SWITCH, 4)
    layer.run(one_hot(tokens, 4))
    assert torch.equal(layer.routing.load, load)
    found = layer.package.network.load_statistics(layer.routing.load.double())
    case.holds(**{name: found[name] for name in case.expected})


TWO = "lb-loss-variants-top2-two-layers"


def of_layers(logits: list[Tensor], loss: dict[str, Any], k: int) -> tuple[Any, list[Any]]:
    """The emitted code of a layer, and its routing of each layer's logits."""
    layer = gates({"select": k}, logits[0].shape[1], losses=loss)
    records = []
    for each in logits:
        layer.run(each)
        records.append(layer.routing)
    return layer.package.model, records


@worked(TWO)
def test_balance_losses_of_two_layers(case: Case) -> None:
    logits, k = [case["logits_layer0"], case["logits_layer1"]], case.params["k"]
    named = {
        "first": "gshard_first_choice_only_per_layer",
        "all": "flaxformer_sum_over_topk_per_layer",
        "mean": "megablocks_or_deepseek_divided_by_k_per_layer",
    }
    reduced = {"all": "flaxformer_mean_over_layers", "mean": "megablocks_mean_over_layers"}
    pooled = {"all": "hf_mixtral_concat_all_layers", "mean": "hf_mixtral_divided_by_k"}
    for count, name in named.items():
        code, records = of_layers(logits, balance(count, reduction="mean"), k)
        each = torch.stack([record.losses["balance"] for record in records])
        same(each, case.want(name))
        if count in reduced:
            same(code.mean_over_layers(records, "balance"), case.want(reduced[count]))
        if count == "mean":
            case.holds(deepseek_formula_check=each)
    for count, name in pooled.items():
        code, records = of_layers(logits, balance(count, reduction="pooled"), k)
        same(code.pooled_balance_loss(records, k if count == "all" else 1), case.want(name))


@worked("lb-loss-hf-cancellation")
def test_opposite_collapses_cancel_in_a_pooled_loss(case: Case) -> None:
    logits = [case["probs_layer0"].log(), case["probs_layer1"].log()]
    code, records = of_layers(logits, balance("mean", reduction="mean"), case.params["k"])
    case.holds(per_layer_mean=code.mean_over_layers(records, "balance"))
    code, records = of_layers(logits, balance("mean", reduction="pooled"), case.params["k"])
    case.holds(hf_concat=code.pooled_balance_loss(records, 1))


@worked("aux-loss-local-vs-global-batch")
def test_balance_within_groups_or_over_the_batch(case: Case) -> None:
    probs = torch.cat((case["probs_rank0"], case["probs_rank1"]))
    for name, group in (("mean_of_local", len(probs) // 2), ("global_batch", "batch")):
        layer = gates(SWITCH, 2, group=group, losses=FIRST)
        layer.run(probs.log())
        same(layer.routing.losses["balance"], case.want(name))


def test_numbers_are_compared_within_the_files_tolerance() -> None:
    same(tensor([1.0 + 9e-10]), [1.0])
    for wrong in (1.0 + 2e-7, float("nan")):
        try:
            same(tensor([wrong]), [1.0])
        except AssertionError:
            continue
        raise AssertionError(f"{wrong} counts as 1")
