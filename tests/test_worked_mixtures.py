"""Worked cases of mixtures that are the whole model (reference A), and of multi-task ones (B23)."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from worked_numbers import Case, Draws, emitted, same, watched, worked

import moegen

SPECS = Path(__file__).parent.parent / "specs"
WIDE = {"parameters": "fp64", "router": "fp64"}


def package_of(**model: Any) -> ModuleType:
    """The emitted package of a section in fp64."""
    return emitted({"name": "worked", "model": model, "precision": WIDE})


def model_of(kind: str, inputs: int, **model: Any) -> Any:
    """The emitted model of a section in fp64."""
    return package_of(kind=kind, inputs=inputs, **model).Model()


def mixture(inputs: int, target: Any, layer: dict[str, Any], **model: Any) -> Any:
    """A mixture of one layer."""
    return model_of("mixture", inputs, target=target, layers=[layer], **model)


def put(module: Any, **values: Tensor) -> None:
    """Give a module's parameters their values."""
    with torch.no_grad():
        for name, value in values.items():
            own = getattr(module, name)
            own.copy_(value.reshape(own.shape))


def linear(count: int, **rest: Any) -> dict[str, Any]:
    """Linear experts without biases, or ReLU units."""
    return {"count": count, "bias": False, **rest}


@worked("jacobs1991-losses")
def test_three_errors_and_their_gradients(case: Case) -> None:
    target, logits = case["target"].unsqueeze(0), case["gate_logits"]
    for name, short in (
        ("cooperative", "cooperative"),
        ("competitive", "competitive"),
        ("mixture", "mixture_nll"),
    ):
        net = mixture(1, 2, {"experts": linear(3)}, objective=name)
        put(net.layers[0], down=case["expert_outputs"], router=logits)
        x = torch.ones(1, 1, dtype=torch.float64)  # so outputs and logits are parameters
        loss, out = net.training_loss(x, target)
        loss.backward()
        case.holds(**{f"E_{short}": loss})
        gradient = net.layers[0].down.grad.squeeze(-1)
        if name == "cooperative":
            case.holds(dE_cooperative_dO=gradient, gate=out.gates[0])
            case.holds(mixture_output=net.predict(x)[0])
        elif name == "competitive":
            case.holds(dE_competitive_dO=gradient)
        else:
            case.holds(dE_mixture_dO=gradient, posterior=net.posterior(x, target)[0])
            case.holds(dE_mixture_dgate_logits=net.layers[0].router.grad[:, 0])


def tree(branches: list[int], **rest: Any) -> dict[str, Any]:
    """A layer of linear leaves under a tree of gates, without biases."""
    leaves = 1
    for branch in branches:
        leaves *= branch
    score = {"kind": "tree", "branches": branches, "bias": False}
    return {"experts": linear(leaves, **rest), "router": {"score": score}}


@worked("hme1994-forward-posterior")
def test_a_hierarchical_mixture_and_its_posteriors(case: Case) -> None:
    target = {"kind": "values", "outputs": 1, "variance": case.inputs["variance"]}
    net = mixture(2, target, tree([2, 2]), objective="mixture")
    gates = {"router_1": case["top_gate"], "router_2": case["sub_gates"]}
    put(net.layers[0], down=case["expert_weights"], **gates)
    x, y = case["x"].unsqueeze(0), torch.tensor([[case.inputs["y"]]], dtype=torch.float64)
    out = net(x)
    joint, means = out.gates.view(2, 2), out.outputs.view(2, 2)
    case.holds(g_top=joint.sum(1), g_cond=joint / joint.sum(1, keepdim=True), expert_means=means)
    case.holds(sub_outputs=(joint * means).sum(1) / joint.sum(1), output=net.predict(x)[0, 0])
    case.holds(log_likelihood=net.log_likelihood(x, y)[0])
    h = net.posterior(x, y).view(2, 2)
    case.holds(h_joint=h, h_top=h.sum(1), h_cond=h / h.sum(1, keepdim=True))


@worked("hme1994-mstep-wls")
def test_the_m_step_is_weighted_least_squares(case: Case) -> None:
    net = mixture(2, "values", {"experts": linear(2)}, objective="mixture")
    weights = case["posterior_weights"]
    posterior = torch.stack((weights, 1 - weights), 1)
    net.maximise(case["X"], case["y"].unsqueeze(1), posterior)
    case.holds(beta=net.layers[0].down[0, 0])


def deep(case: Case) -> Any:
    """The two layers of Eigen et al. with the case's numbers."""
    stages = ("experts_1", "gate_1"), ("experts_2", "gate_2")
    layers = []
    for experts, _ in stages:
        count, width, _ = case[experts].shape
        layers.append({"experts": linear(count, activate_output=True), "width": width})
    classes = len(case.inputs["W_out"])
    net = model_of(
        "mixture",
        len(case.inputs["x"]),
        target={"kind": "classes", "count": classes},
        layers=layers,
        head={"bias": False},
    )
    for layer, (experts, gate) in zip(net.layers, stages, strict=True):
        put(layer, down=case[experts], router=case[gate])
    put(net, head=case["W_out"])
    return net


@worked("eigen2013-deep-moe-forward")
def test_stacked_mixtures(case: Case) -> None:
    net, x = deep(case), case["x"].unsqueeze(0)
    kept: list[Tensor] = []
    for layer in net.layers:
        layer.register_forward_hook(lambda _, __, out: kept.append(out[0]))
    routing = net(x).routing
    case.holds(g1=routing[0].probability, g2=routing[1].probability, z1=kept[0][0], z2=kept[1][0])
    case.holds(output=net.predict(x)[0])
    case.holds(effective_expert_paths=len(net.layers[0].down) * len(net.layers[1].down))


@worked("eigen2013-running-assignment-constraint")
def test_gates_by_running_totals(case: Case) -> None:
    gates = case["gates"]
    layer = {"experts": linear(3), "margin": case.params["margin"]}
    net = mixture(len(gates), 1, layer)
    put(net.layers[0], router=gates.log().T)
    assert net.layers[0].totals.tolist() == case.inputs["initial_totals"]
    x = torch.eye(len(gates), dtype=torch.float64)
    case.holds(gates_used=net.train()(x).gates)
    case.holds(final_totals=net.layers[0].totals.double())
    same(net.eval()(x).gates, gates.tolist())
    net.drop_constraint()
    same(net.train()(x).gates, gates.tolist())


@worked("mmoe-forward")
def test_gates_of_each_task_over_shared_experts(case: Case) -> None:
    x, experts, gates = case["x"].unsqueeze(0), case["experts"], case["gates"]

    def made(how: str, count: int) -> Any:
        held = {"experts": linear(count, activate_output=True), "width": 2}
        facts = {"mixture": held, "gates": how, "tower": {"bias": False}}
        net = model_of("multitask", 3, **facts, tasks={"one": "values", "two": "values"})
        put(net.experts, down=experts[:count])
        for task, tower in zip(("one", "two"), case["towers"], strict=True):
            put(getattr(net, f"tower_{task}"), output=tower)
        return net

    def predicted(net: Any) -> Tensor:
        return torch.cat(list(net.predict(x).values()), 1)[0]

    net = made("task", 3)
    put(net.gate_one, router=gates[0])
    put(net.gate_two, router=gates[1])
    seen: list[Tensor] = []
    for task in ("one", "two"):
        tower = getattr(net, f"tower_{task}")
        tower.register_forward_hook(lambda _, given, __: seen.append(given[0][0]))
    case.holds(task_outputs=predicted(net), expert_outputs=net.experts(x)[0])
    case.holds(gate=torch.stack([r.probability for r in net(x).routing]))
    case.holds(task_inputs=torch.stack(seen[:2]))
    shared = made("shared", 3)
    put(shared.gate, router=gates[0])
    case.holds(omoe_task_outputs=predicted(shared))
    case.holds(shared_bottom_outputs=predicted(made("none", 1)))


@worked("chen2022-forward-paper")
def test_the_toy_of_chen(case: Case) -> None:
    x = case["patches"].unsqueeze(0)
    label = torch.tensor([case.inputs["label"]])
    count, neurons, width = case["experts"].shape
    for name, activation in (("f_cubic", "cubic"), ("f_linear", "linear")):
        experts = {"count": count, "hidden": [neurons], "activation": activation}
        noise = {"kind": "uniform", "selection_only": True}
        layer = {
            "patches": len(case.inputs["patches"]),
            "experts": {**experts, "signs": True, "bias": False},
            "router": {"select": 1, "noise": noise},
        }
        section = {"kind": "mixture", "inputs": width, "target": "binary", "layers": [layer]}
        package = package_of(**section)
        net = package.Model()
        put(net.layers[0], up=case["experts"], router=case["router"])
        same(net.layers[0].signs[0].long(), case.inputs["a"])
        found = {}
        with watched(package) as calls, Draws(rand_like=case["router_noise"].unsqueeze(0)):
            loss, out = net.train().training_loss(x, label)
        chosen = calls["top_k"][0].result.item()
        pi = out.routing[0].probability
        found[chosen] = out.outputs[0, 0] / pi[chosen]
        with watched(package) as calls:
            clean = net.eval()(x)
        best = calls["top_k"][0].result.item()
        found[best] = clean.outputs[0, 0] / pi[best]
        same([found[0].item(), found[1].item()], case.want(name))
        if name == "f_cubic":
            case.holds(selected_with_noise=chosen, selected_without_noise=best, pi=pi, loss=loss)
            case.holds(F=out.outputs[0, 0], h=F.linear(x[0].sum(0), net.layers[0].router))


@worked("chen2022-normalised-gd")
def test_descent_by_normalised_gradients(case: Case) -> None:
    net = mixture(2, 2, {"experts": {"count": 1}})
    layer = net.layers[0]
    put(layer, down=torch.zeros(1, 2, 2), down_bias=torch.zeros(1, 2))
    layer.down.grad = case["grad_weight"].unsqueeze(0).clone()
    layer.down_bias.grad = case["grad_bias"].unsqueeze(0).clone()
    net.normalise_gradients("sum")
    case.holds(expert_norm=case["grad_weight"][0, 0] / layer.down.grad[0, 0, 0])
    torch.optim.SGD([layer.down, layer.down_bias], lr=case.inputs["lr"]).step()
    case.holds(update_weight=layer.down[0], update_bias=layer.down_bias[0])


@worked("tom-yeh-by-hand")
def test_the_exercise_by_hand(case: Case) -> None:
    plan = moegen.plan(SPECS / "tom-yeh.yaml")
    package = package_of(**plan.data["model"])
    net = package.Model()
    put(net.layers[0], down=case["experts"], router=case["gate"])
    with watched(package) as calls:
        case.holds(outputs=net(case["tokens"]).outputs)
    case.holds(selected=calls["top_k"][0].result[:, 0])
    case.holds(gate_scores=F.linear(case["tokens"], net.layers[0].router))
    parameters, active, _ = plan.root.totals()["routed_experts"]
    case.holds(params_per_expert=parameters // 2, active_fraction=active / parameters)


@worked("classic-pooling")
def test_rules_of_pooling(case: Case) -> None:
    outputs, gate = case["expert_outputs"], case["gate"]
    target = {"kind": "classes", "count": 3}
    found = {}
    x = torch.ones(1, 1, dtype=torch.float64)
    for pooling in ("average", "weighted", "vote", "winner"):
        net = mixture(1, target, {"experts": linear(3)}, objective="mixture", pooling=pooling)
        put(net.layers[0], down=outputs.log(), router=gate.log())
        found[pooling] = net.predict(x)[0]
    case.holds(simple_average=found["average"], gate_weighted=found["weighted"])
    case.holds(hard_selection=found["winner"], majority_class=int(found["vote"].argmax()))
    case.holds(argmax_average=int(found["average"].argmax()))
    case.holds(argmax_weighted=int(found["weighted"].argmax()))
    votes = net(x).outputs[0].argmax(-1)
    case.holds(expert_votes=votes)
    same(found["vote"], F.one_hot(votes, 3).double().mean(0).tolist())
