"""What mixtures on vectors promise: likelihoods that rise, experts that rest, tasks that share."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import filled, imported, made
from torch import Tensor
from vector_specs import ALL, RELU, WIDE, any_batch, batch_of, labels_of, mixture, multitask

import moegen
from moegen.observe import Recorder

SPECS = Path(__file__).parent.parent / "specs"
LINEAR = {"score": {"kind": "linear", "bias": True}}
TREES = {"linear": (4, LINEAR)} | {
    str(branches): (int(np.prod(branches)), {"score": {"kind": "tree", "branches": branches}})
    for branches in ([3], [2, 2], [2, 2, 2], [3, 2])
}
KINDS: dict[str, Any] = {
    "values": {"outputs": 2, "variance": 0.3},
    "binary": "binary",
    "classes": {"kind": "classes", "count": 3},
}


def likely(target: Any, experts: int, router: dict[str, Any], bias: bool = True) -> Any:
    """A mixture of linear experts in fp64 that starts at random."""
    layer = {"experts": {"count": experts, "bias": bias}, "router": router}
    spec = mixture(
        "likely", target, [layer], objective="mixture", precision=WIDE, init={"std": 0.5}
    )
    torch.manual_seed(1)
    return imported(spec).Model()


def bent(kind: str, count: int = 80) -> tuple[Tensor, Tensor]:
    """Examples that no linear model explains."""
    chance = torch.Generator().manual_seed(5)
    x = torch.randn(count, 3, generator=chance, dtype=torch.float64)
    if kind == "values":
        noise = 0.1 * torch.randn(count, 2, generator=chance, dtype=torch.float64)
        return x, torch.stack((x[:, 0].abs(), (x[:, 1] * x[:, 2]).sign()), 1) + noise
    classes = (x[:, 0] * x[:, 1] > 0).long()
    return x, classes if kind == "binary" else classes + (x[:, 2] > 0.5)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", KINDS)
def test_em_never_lowers_the_likelihood(kind: str, tree: str) -> None:
    model, (x, y) = likely(KINDS[kind], *TREES[tree]), bent(kind)
    seen = [model.em_step(x, y) for _ in range(12)]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(seen))
    assert seen[-1] > seen[0] + 0.1


def test_the_m_step_of_a_gaussian_expert_is_that_of_numpy() -> None:
    model, (x, y) = likely(KINDS["values"], *TREES["[2, 2]"]), bent("values")
    h = model.posterior(x, y).detach()
    torch.testing.assert_close(h.sum(1), torch.ones_like(h[:, 0]))
    model.maximise(x, y, h)
    design = np.concatenate([x.numpy(), np.ones((len(x), 1))], 1)
    for expert in range(4):
        root = np.sqrt(h[:, expert].numpy())[:, None]
        best = np.linalg.lstsq(root * design, root * y.numpy(), rcond=None)[0]
        layer = model.layers[0]
        ours = np.concatenate([layer.down[expert].detach().numpy().T,
                               layer.down_bias[expert].detach().numpy()[None]])  # fmt: skip
        np.testing.assert_allclose(ours, best, atol=1e-8)


@pytest.mark.parametrize("kind", ["binary", "classes"])
def test_the_m_step_ends_where_no_weighted_gradient_is_left(kind: str) -> None:
    model, (x, y) = likely(KINDS[kind], 3, LINEAR), bent(kind)
    h = torch.full((len(x), 3), 1 / 3, dtype=torch.float64)
    h[:40] = torch.tensor([0.5, 0.3, 0.2])
    model.maximise(x, y, h, rounds=30)
    out = model(x)
    value = (h * (model.log_density(out.outputs, y) + out.gates.log())).sum()
    names = [name for name, _ in model.named_parameters()]
    for name, grad in zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True):
        assert grad.abs().max() < 1e-6, name


def test_em_says_what_it_cannot_fit() -> None:
    for name in ("deep", "classes", "patches"):
        with pytest.raises(TypeError, match=r"EM fits one layer|experts are mixed"):
            made(ALL[name]).em_step(*any_batch(ALL[name]))


def test_a_tree_of_one_level_is_a_linear_gate() -> None:
    tree = {"score": {"kind": "tree", "branches": [4]}}
    one, other = (likely(KINDS["values"], 4, router) for router in (LINEAR, tree))
    state = one.state_dict()
    state["layers.0.router_1"] = state.pop("layers.0.router").unsqueeze(0)
    state["layers.0.router_1_bias"] = state.pop("layers.0.router_bias").unsqueeze(0)
    other.load_state_dict(state)
    x, y = bent("values")
    losses = [model.training_loss(x, y)[0] for model in (one, other)]
    torch.testing.assert_close(*losses)
    for model in (one, other):
        model.em_step(x, y)
    torch.testing.assert_close(one.layers[0].down, other.layers[0].down)
    torch.testing.assert_close(one.predict(x), other.predict(x))


def test_the_mixture_is_at_most_half_the_competition() -> None:
    x, y = bent("values")
    losses = {}
    for objective in ("mixture", "competitive"):
        spec = mixture("jensen", 2, [{"experts": 5}], objective=objective, precision=WIDE)
        losses[objective] = filled(imported(spec).Model).training_loss(x, y)[0]
    assert losses["mixture"] <= losses["competitive"] / 2


def test_gaussian_gradients_are_those_of_the_paper() -> None:
    model, (x, y) = likely({"outputs": 2, "variance": 1.0}, 3, LINEAR), bent("values")
    out = model(x)
    loss = model.loss(out.outputs, y, out.gates)
    (grad,) = torch.autograd.grad(loss, out.outputs)
    h = model.posterior(x, y)
    expected = -h.unsqueeze(-1) * (y.unsqueeze(1) - out.outputs) / len(x)
    torch.testing.assert_close(grad, expected)


# Experts that are not chosen


@pytest.mark.parametrize("name", ["patches", "unlike", "annealed"])
def test_the_output_is_that_of_all_experts_masked(name: str) -> None:
    source = ALL[name]
    model, (x, _) = made(source).eval(), any_batch(source)
    layer = model.layers[0]
    section = {**source["model"]["layers"][0], "router": {}, "losses": {}}
    section.pop("anneal", None)
    section.setdefault("width", 1)
    target = {"outputs": section["width"]}
    dense = imported(mixture("dense", target, [section])).Model().eval()
    state = {k: v for k, v in layer.state_dict().items() if "noise" not in k and k != "current_k"}
    dense.layers[0].load_state_dict(state)
    outputs = dense(x).outputs
    seen = x.sum(1) if x.dim() == 3 else x
    logits = F.linear(seen, layer.router)
    k = source["model"]["layers"][0]["router"]["select"]
    k = source["model"]["layers"][0].get("anneal", {}).get("start", k)
    best = logits.topk(k).indices
    gates = torch.zeros_like(logits)
    if name == "patches":
        gates = gates.scatter(1, best, logits.softmax(-1).gather(1, best))
    else:
        gates = gates.scatter(1, best, logits.gather(1, best).softmax(-1))
    expected = (gates.unsqueeze(-1) * outputs).sum(1)
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_an_expert_that_is_not_chosen_is_not_run() -> None:
    spec = mixture("one", 2, [{"experts": 3, "router": {"select": 1}}])
    model, (x, _) = made(spec), batch_of(spec)
    with torch.no_grad():
        model.layers[0].router[:] = 0  # ties go to the first
        model.layers[0].down[1:] = float("nan")
    assert model(x).outputs.isfinite().all()


def test_fewer_experts_are_chosen_as_training_goes_on() -> None:
    model, (x, _) = made(ALL["annealed"]), any_batch(ALL["annealed"])
    rows = []
    for step in (0, 5, 10, 20, 99):
        model.anneal(step)
        rows.append([int(record.load.sum()) // len(x) for record in model(x).routing])
    assert rows == [[4, 3], [3, 2], [2, 2], [2, 1], [2, 1]]


# Recipes


@pytest.mark.parametrize("norm", ["frobenius", "sum"])
def test_each_experts_gradient_has_length_one(norm: Any) -> None:
    model = made(ALL["unlike"])
    model.training_loss(*any_batch(ALL["unlike"]))[0].backward()
    router = model.layers[0].router.grad.clone()
    model.normalise_gradients(norm)
    assert torch.equal(model.layers[0].router.grad, router)
    for layer in model.layers:
        for suffix, count in (("_of_1", 2), ("_of_2", 3)):
            own = [p.grad for n, p in layer.named_parameters() if suffix in n]
            for expert in range(count):
                norms = torch.stack([grad[expert].norm() for grad in own])
                total = norms.sum() if norm == "sum" else norms.norm()
                assert total.item() == pytest.approx(1.0, abs=1e-5) or total == 0


def test_chens_toy_starts_and_is_trained_as_the_paper_has_it() -> None:
    model = imported(moegen.load(SPECS / "chen2022-cubic.yaml").data).Model()
    assert not model.layers[0].router.any()
    assert 0 < model.layers[0].up.abs().max() < 0.01
    rates = {group["name"]: group["lr"] for group in model.parameter_groups(lr=0.001)}
    assert rates == {"experts": 0.001, "router": pytest.approx(0.1)}


def test_a_mixture_learns_what_one_expert_cannot() -> None:
    x, y = bent("values", 400)
    losses = []
    for experts in (1, 4):
        layer = {"experts": {"count": experts}, "router": LINEAR}
        spec = mixture("learns", 2, [layer], objective="mixture", precision=WIDE)
        model = filled(imported(spec).Model)
        adam = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(150):
            loss, _ = model.training_loss(x, y)
            adam.zero_grad()
            loss.backward()
            adam.step()
        losses.append(float(F.mse_loss(model.predict(x), y)))
    assert losses[1] < losses[0] / 2


def test_routing_is_recorded(tmp_path: Path) -> None:
    model = made(ALL["deep"])
    recorder = Recorder([0, 1])
    for step in range(3):
        loss, output = model.training_loss(*any_batch(ALL["deep"]))
        recorder.record(step, output.routing, losses=output.losses, loss=loss)
    recorder.to_html(tmp_path / "routing.html")
    assert (tmp_path / "routing.html").exists()


# Several tasks


def test_equal_gates_are_one_gate() -> None:
    many = made(multitask("many", {"experts": RELU}))
    one = made(multitask("one", {"experts": RELU}, gates="shared"))
    state = {k: v for k, v in many.state_dict().items() if not k.startswith("gate_")}
    one.load_state_dict({**state, "gate.router": many.gate_clicks.router.detach()})
    for name in ("kind", "price"):
        getattr(many, f"gate_{name}").load_state_dict(many.gate_clicks.state_dict())
    x, labels = labels_of(ALL["mmoe"])
    for task, made_of in many.predict(x).items():
        torch.testing.assert_close(made_of, one.predict(x)[task])
    torch.testing.assert_close(*(m.training_loss(x, labels)[0] for m in (many, one)))


def test_experts_that_no_task_chose_are_not_run() -> None:
    model, (x, _) = made(ALL["sparse-mmoe"]), labels_of(ALL["sparse-mmoe"])
    wanted = torch.cat([getattr(model, f"gate_{t}")(x)[0] for t in ("clicks", "kind", "price")])
    with torch.no_grad():
        for gate in (model.gate_clicks, model.gate_kind, model.gate_price):
            gate.router[:] = 0  # ties go to the first two
        model.experts.down[2:] = float("nan")
    assert wanted.count_nonzero(1).tolist() == [2] * 3 * len(x)
    outputs = model.experts(x, torch.ones(len(x), 3, 4) * torch.tensor([1.0, 1, 0, 0]))
    assert outputs.isfinite().all()
    assert not outputs[:, 2:].any()
    assert all(v.isfinite().all() for v in model.predict(x).values())


@pytest.mark.parametrize("name", ["mmoe", "omoe", "bottom", "sparse-mmoe"])
def test_active_parameters_by_task(name: str) -> None:
    estimate = moegen.estimate(ALL[name])
    shapes = {k: v.numel() for k, v in imported(ALL[name]).Model().named_parameters()}
    for task, used in estimate.by_task.items():
        other = {t for t in estimate.by_task if t != task}
        own = {k: n for k, n in shapes.items() if not any(f"_{t}." in k for t in other)}
        share = 0.5 if name == "sparse-mmoe" else 1
        experts = sum(n for k, n in own.items() if k.startswith("experts."))
        assert used == sum(own.values()) - experts + share * experts


def test_labels_of_every_task_are_asked_for() -> None:
    model, (x, labels) = made(ALL["mmoe"]), labels_of(ALL["mmoe"])
    labels.pop("price")
    with pytest.raises(ValueError, match=r"labels are needed for \['clicks', 'kind', 'price'\]"):
        model.training_loss(x, labels)


@pytest.mark.parametrize("name", ["jacobs1991", "mmoe"])
def test_examples_have_no_length(name: str) -> None:
    assert moegen.plan(SPECS / f"{name}.yaml", batch=3).workload.batch == 3
    with pytest.raises(moegen.MoegenError, match="a row, which has no length"):
        moegen.plan(SPECS / f"{name}.yaml", sequence=8)


@pytest.mark.parametrize("name", ["likely", "unlike", "dense-patches"])
def test_layers_that_are_computed_again_have_the_same_gradients(name: str) -> None:
    gradients = []
    for again in (False, True):
        model = made(ALL[name])
        if again:
            model.checkpoint_layers()
        torch.manual_seed(4)
        model.training_loss(*any_batch(ALL[name]))[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_totals_are_not_counted_twice() -> None:
    with pytest.raises(TypeError, match="runs only once"):
        made(ALL["deep"]).checkpoint_layers()


def test_experts_that_are_closed_are_not_run() -> None:
    spec = mixture(
        "doors", 2, [{"experts": 3, "router": {"affinity": "sigmoid"}, "stochastic": 0.5}]
    )
    model, (x, _) = made(spec).eval(), batch_of(spec)
    layer = model.layers[0]
    wanted = (F.linear(x, layer.router) > 0).float()
    outputs = torch.einsum("bd,end->ben", x, layer.down) + layer.down_bias
    expected = (wanted.unsqueeze(-1) * outputs).sum(1)
    torch.testing.assert_close(model(x).outputs, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        layer.router[0] = -100 * x[0]  # closed for the first example at least
        layer.down[0] = float("nan")
    assert model(x[:1]).outputs.isfinite().all()


def test_as_many_gates_open_as_the_target_says() -> None:
    layer = {
        "experts": 8,
        "router": {"affinity": "sigmoid", "score": {"kind": "linear", "bias": True}},
        "stochastic": {"target": 0.25, "weight": 50.0},
    }
    spec = mixture("sparse-doors", 2, [layer])
    model, (x, y) = made(spec), batch_of(spec, 64)
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(100):
        loss, _ = model.training_loss(x, y)
        adam.zero_grad()
        loss.backward()
        adam.step()
    shares = [model(x).routing[0].load.sum().item() / (64 * 8) for _ in range(20)]
    assert sum(shares) / 20 == pytest.approx(0.25, abs=0.05)
