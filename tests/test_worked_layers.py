"""Worked cases of whole routed layers, from the first mixtures on (reference A, B9, B23, C)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from worked_numbers import (
    Case,
    Draws,
    Layer,
    decoder,
    emitted,
    gates,
    relu_experts,
    same,
    worked,
)

import moegen

FAMILY = "the likelihood and its posteriors train a mixture that is the whole model"


def scores(layer: Layer) -> Tensor:
    """The router's scores [T, E] in the last run."""
    return layer.calls["masked_mean"][0].args[0]  # type: ignore[no-any-return]


def linear(layer: Layer, matrices: Tensor) -> Layer:
    """Give linear experts [E, n, d] their matrices, with n as wide as the token."""
    width = layer.net.up.shape[2]
    down = torch.eye(width, dtype=torch.float64)[:, : matrices.shape[1]]
    return layer.set(up=matrices, down=down)


@worked(
    "jacobs1991-losses",
    E_competitive=FAMILY,
    E_mixture_nll=FAMILY,
    posterior=FAMILY,
    dE_competitive_dO=FAMILY,
    dE_mixture_dO=FAMILY,
    dE_mixture_dgate_logits=FAMILY,
)
def test_a_mixture_of_all_experts(case: Case) -> None:
    layer = gates({"select": "all"}, 3)
    outputs = torch.nn.functional.pad(case["expert_outputs"], (0, 1))
    out = layer.set(down_bias=outputs).run(case["gate_logits"].unsqueeze(0))[0, :2]
    error = (case["target"] - out).square().sum()
    error.backward()
    case.holds(gate=layer.routing.probability, mixture_output=out, E_cooperative=error)
    case.holds(dE_cooperative_dO=layer.net.down_bias.grad[:, :2])


@worked(
    "hme1994-forward-posterior",
    log_likelihood=FAMILY,
    h_joint=FAMILY,
    h_top=FAMILY,
    h_cond=FAMILY,
)
def test_a_hierarchical_mixture(case: Case) -> None:
    nested = {"count": 2, "router": {"select": "all"}}
    experts = {"count": 2, "width": 1, "activation": "linear", "nested": nested}
    layer = Layer({"experts": experts, "router": {"select": "all"}}, 2)
    layer.set(router=case["top_gate"], inner_router=case["sub_gates"])
    linear(layer, case["expert_weights"].view(4, 1, 2))
    out = layer.run(case["x"].unsqueeze(0))
    inner, outer = layer.calls["combine"]
    case.holds(output=out[0, 0], g_top=outer.args[2][0], g_cond=inner.args[2])
    case.holds(sub_outputs=inner.result[:, 0])
    leaves = layer.calls["grouped_linear"][-1].result[:, 0]
    case.holds(expert_means=leaves.view(2, 2))


def stage(experts: Tensor, gate: Tensor, x: Tensor) -> tuple[Layer, Tensor]:
    """A dense mixture of ReLU experts [E, n, d] and its first n outputs."""
    count, n, width = experts.shape
    held = {"count": count, "width": n, "activation": "relu"}
    layer = relu_experts(Layer({"experts": held, "router": {"select": "all"}}, width), experts)
    return layer, layer.set(router=gate).run(x.unsqueeze(0))[0, :n]


@worked("eigen2013-deep-moe-forward")
def test_a_deep_mixture(case: Case) -> None:
    first, z1 = stage(case["experts_1"], case["gate_1"], case["x"])
    second, z2 = stage(case["experts_2"], case["gate_2"], z1)
    case.holds(g1=first.routing.probability, z1=z1, g2=second.routing.probability, z2=z2)
    case.holds(output=(case["W_out"] @ z2).softmax(0))
    case.holds(effective_expert_paths=len(first.net.up) * len(second.net.up))


@worked("mmoe-forward")
def test_gates_of_each_task_over_shared_experts(case: Case) -> None:
    x, experts, towers = case["x"], case["experts"], case["towers"]
    held = {"count": 3, "width": 2, "activation": "relu"}
    router = {"select": "all", "gates": {"id": "task", "count": 2}}
    layer = relu_experts(Layer({"experts": held, "router": router}, 3), experts)
    layer.set(router=case["gates"])
    out = layer.run(x.expand(2, -1), task=torch.arange(2))[:, :2]
    case.holds(gate=scores(layer), task_inputs=out, task_outputs=(out * towers).sum(1))
    _, alike = stage(experts, case["gates"][0], x)
    case.holds(omoe_task_outputs=towers @ alike)
    _, bottom = stage(experts[:1], torch.zeros(1, 3), x)
    case.holds(shared_bottom_outputs=towers @ bottom)
    rows = layer.calls["grouped_linear"][-1].result[:, :2]  # sorted by expert, two tokens each
    case.holds(expert_outputs=rows[::2])


def patches(case: Case, activation: str) -> Layer:
    """The layer of Chen et al.: a sequence of patches is routed by their sum."""
    experts = case["experts"]
    count, neurons, width = experts.shape
    noise = {"kind": "uniform", "selection_only": True}
    moe = {
        "experts": {"count": count, "width": neurons, "activation": activation},
        "router": {"input": "sentence", "noise": noise, "select": 1},
        "losses": {"z": 1.0},
    }
    layer = Layer(moe, width)
    down = torch.zeros_like(layer.net.down)
    down[:, 0] = case["a"].double()
    # What the router sees is the mean of patches, their sum but for a factor.
    layer.set(up=experts, down=down, router=case["router"] * len(case["patches"]))
    return layer


@worked("chen2022-forward-paper")
def test_the_toy_mixture_of_chen(case: Case) -> None:
    x = case["patches"]
    for name, activation in (("f_cubic", "cubic"), ("f_linear", "linear")):
        layer = patches(case, activation)
        found = torch.zeros(2, dtype=torch.float64)
        with Draws(rand_like=case["router_noise"].expand(len(x), -1)):
            noisy = layer.run(x)[:, 0].sum()
        chosen, pi = layer.result("top_k")[0].item(), layer.routing.probability
        found[chosen] = noisy / pi[chosen]
        clean = layer.run(x, training=False)[:, 0].sum()
        best = layer.result("top_k")[0].item()
        found[best] = clean / pi[best]
        same(found, case.want(name))
        if name == "f_cubic":
            loss = torch.nn.functional.softplus(-case.inputs["label"] * noisy)
            case.holds(h=layer.calls["z_loss"][0].args[0][0], pi=pi, F=noisy, loss=loss)
            case.holds(selected_with_noise=chosen, selected_without_noise=best)


def active(moe: dict[str, Any], width: int) -> float:
    """Parameters of routed experts that a token uses, of all they have."""
    count, used, _ = moegen.plan(decoder(moe, width), sequence=4).root.totals()["routed_experts"]
    return used / count


@worked(
    "tom-yeh-by-hand",
    params_per_expert="the exercise's expert is one matrix, an expert of the language is two",
)
def test_the_exercise_by_hand(case: Case) -> None:
    moe = {
        "experts": {"count": 2, "width": 4, "activation": "relu"},
        "router": {"select": 1, "gate": "constant"},
        "losses": {"z": 1.0},
    }
    layer = relu_experts(Layer(moe, 4), case["experts"]).set(router=case["gate"])
    case.holds(outputs=layer.run(case["tokens"]))
    case.holds(gate_scores=layer.calls["z_loss"][0].args[0])
    case.holds(selected=layer.result("top_k")[:, 0], active_fraction=active(moe, 4))


VOTES = "a vote counts classes of outputs, where a layer adds outputs"


@worked("classic-pooling", expert_votes=VOTES, majority_class=VOTES)
def test_ways_to_pool(case: Case) -> None:
    logits, outputs = case["gate"].log().unsqueeze(0), case["expert_outputs"]
    rules: dict[str, dict[str, Any]] = {
        "simple_average": {
            "select": "all",
            "gate": {"normalize": "constant", "scale": 1 / len(outputs)},
        },
        "gate_weighted": {"select": "all"},
        "hard_selection": {"select": 1, "gate": "constant"},
    }
    found = {}
    for name, router in rules.items():
        found[name] = gates(router, 3).set(down_bias=outputs).run(logits)[0]
    case.holds(**found)
    case.holds(argmax_average=found["simple_average"].argmax().item())
    case.holds(argmax_weighted=found["gate_weighted"].argmax().item())


@worked("upcycling-equivalence")
def test_a_mixture_of_copies_is_the_dense_network(case: Case) -> None:
    matrix, x = case["dense_weight"], case["x"].unsqueeze(0)
    network = {"width": 2, "activation": "relu"}
    dense = emitted(decoder(None, 2, ffn=network)).model.FeedForward()
    with torch.no_grad():
        dense.up.copy_(matrix)
        dense.down.copy_(torch.eye(2))
    case.holds(dense_output=dense(x)[0])
    logits = case["router_probs"].log()
    for name, router in (
        ("top2_normalised", {"select": 2, "gate": "sum"}),
        ("top2_raw", {"select": 2}),
        ("top1_raw", {"select": 1}),
    ):
        layer = Layer({"experts": {"count": 4, **network}, "router": router}, 2)
        layer.set(router=logits.unsqueeze(1) / x.sum())
        same(relu_experts(layer, matrix.expand(4, 2, 2)).run(x)[0], case.want(name))


@worked("openmoe-residual-parallel-vs-sequential")
def test_a_dense_network_beside_or_after_the_mixture(case: Case) -> None:
    network = {"width": 2, "activation": "linear"}
    for name, where in (("parallel_paper", "residual"), ("sequential_code", "extra")):
        moe = {"experts": {"count": 1, **network}, "router": {"select": 1}, where: network}
        norm = {"kind": "rms", "eps": 1e-30}
        attention = {"heads": 1, "head_dim": 2, "rope": None}
        code = emitted(decoder(moe, 2, norm=norm, attention=attention)).model
        block = code.MoEBlock()
        mixture = block.moe
        beside = mixture.residual if where == "residual" else block.extra
        with torch.no_grad():
            block.attention.output.zero_()
            mixture.up.copy_(case["moe_map"])
            beside.up.copy_(case["ffn_map"])
            mixture.down.copy_(torch.eye(2))
            beside.down.copy_(torch.eye(2))
        context = code.Context(valid=torch.ones(1, dtype=torch.bool))
        out, _ = block(case["x"].view(1, 1, 2), context)
        same(out[0, 0], case.want(name))


@worked("shazeer-lm-moe-sublayer")
def test_the_mixture_between_recurrent_cells(case: Case) -> None:
    x, weights = case["x"], case["gates"].log().clamp(min=-1e4)
    experts = {"count": 2, "width": 2, "activation": "linear"}
    router = {"select": 2, "gate": "softmax_over_kept"}
    layer = Layer({"experts": experts, "router": router}, 2)
    # Tokens are independent, so there are matrices that give them any gates and any outputs.
    linear(layer, torch.linalg.solve(x, case["expert_outputs"].transpose(0, 1)).mT)
    layer.set(router=torch.linalg.solve(x, weights).t())
    case.holds(moe_output=layer.run(x))
    moe = {"experts": experts, "router": router, "placement": {"insert": 1}}
    model = {"kind": "recurrent", "vocab_size": 8, "d_model": 2, "layers": 2, "moe": moe}
    package = emitted({"name": "between", "model": model, "precision": layer.spec["precision"]})
    sublayer = package.model.MixtureLayer()
    sublayer.moe.load_state_dict(layer.net.state_dict())
    out, _ = sublayer(x.unsqueeze(0), torch.ones(2, dtype=torch.bool))
    case.holds(sublayer_output=out[0])
