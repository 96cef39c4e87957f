"""What `train` says of a phase of training is what emitted models and estimates do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counted_flops import expected, forward_and_backward
from kept_memory import distinct_bytes, kept, own
from tiny_models import imported, made, planned, token_ids
from tiny_specs import SPECS, moe, spec
from torch import Tensor

import moegen
from moegen.arch.parts import PARTS, part_of
from moegen.arch.train import Train
from moegen.backend import backend
from moegen.emit.package import package
from moegen.errors import PlanError, SpecError
from moegen.ops.feed_forward import routed_feed_forward
from moegen.ops.gradients import scale_gradient
from moegen.ops.router import route
from moegen.planner import Workload, lower
from moegen.spec import presets

WHOLE = spec(
    "whole",
    {
        "layers": 3,
        "attention": {"heads": 4, "bias": "all"},
        "moe": moe(
            shared=1,
            losses={"balance": 0.01, "z": 0.001},
            capacity={"factor": 1.0, "minimum": 1},
            placement={"layers": [1, 2]},
            router={"select": 2, "score": {"bias": True}},
        ),
    },
)
VARIED = ["dense", "deepseek-v3-like", "gpt-oss-like", "grok-like", "overrides"]
# Which of the parts a name is of, told by names alone.
NAMED = {
    "embedding": ("embedding",),
    "head": ("head",),
    "norms": ("norm",),
    "attention": (".attention.",),
    "dense": (".ffn.",),
    "router": (".moe.router",),
    "experts": (".moe.gate_up", ".moe.down"),
    "shared": (".moe.shared.",),
}


def over(train: dict[str, Any], base: dict[str, Any] = WHOLE) -> dict[str, Any]:
    return {**base, "train": train}


def model_of(train: dict[str, Any], base: dict[str, Any] = WHOLE) -> Any:
    return made(over(train, base)).train()


def named(part: str, model: torch.nn.Module) -> set[str]:
    """Names of the parameters of a part: the last of NAMED that they match."""
    found = set()
    for name, _ in model.named_parameters():
        matching = [p for p, marks in NAMED.items() if any(m in f".{name}" for m in marks)]
        nested = [p for p in matching if p not in ("norms", "head")] or matching
        found |= {name} if nested[-1] == part else set()
    return found


# What is frozen

FREEZES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"freeze": ["router"]}, {"router"}),
    ({"freeze": ["experts", "norms"]}, {"experts", "norms"}),
    ({"freeze": ["moe"]}, {"router", "experts", "shared"}),
    ({"freeze": ["non_moe"]}, {"embedding", "head", "norms", "attention", "dense"}),
    ({"only": ["non_moe"]}, {"router", "experts", "shared"}),
    ({"only": ["attention"]}, set(NAMED) - {"attention"}),
    ({"only": ["dense", "head"]}, set(NAMED) - {"dense", "head"}),
]


@pytest.mark.parametrize(("train", "frozen"), FREEZES)
def test_frozen_parts_are_those_of_their_names(train: dict[str, Any], frozen: set[str]) -> None:
    model = model_of(train)
    still = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert still == {name for part in frozen for name in named(part, model)}
    assert len(set().union(*(named(p, model) for p in NAMED))) == len(list(model.parameters()))


def test_frozen_parameters_stay_as_they_are_and_others_move() -> None:
    model = model_of({"freeze": ["router", "attention"]})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=0.1))
    model.training_loss(token_ids())[0].backward()
    optimizer.step()
    moved = {name for name, value in model.named_parameters() if not value.equal(before[name])}
    assert moved == {name for name, value in model.named_parameters() if value.requires_grad}
    assert moved.isdisjoint(named("router", model) | named("attention", model))


def test_a_phase_loads_the_weights_of_another(tmp_path: Any) -> None:
    file = tmp_path / "weights.safetensors"
    whole = model_of({})
    whole.save(file)
    part = imported(over({"only": ["router"]})).Model.load(file)
    assert {n for n, p in part.named_parameters() if p.requires_grad} == named("router", part)
    assert torch.equal(part.eval()(token_ids()).logits, whole.eval()(token_ids()).logits)


def test_the_code_says_what_is_frozen() -> None:
    plan = planned(over({"freeze": ["router"]}))
    text = package(plan, backend("eager")).files["model.py"]
    assert "Frozen: router." in text
    assert "self.router = nn.Parameter(torch.empty(8, 32), requires_grad=False)" in text
    assert text.count("requires_grad") == 2  # and its bias


# What a phase costs

SUBSETS: list[dict[str, Any]] = [
    *({"only": [part]} for part in ("experts", "router", "attention", "head", "moe", "embedding")),
    *({"freeze": [part]} for part in ("experts", "router", "attention", "embedding", "norms")),
    {"freeze": ["embedding", "experts", "head"]},
]


@pytest.mark.parametrize("train", SUBSETS, ids=str)
@pytest.mark.parametrize("name", ["plain-moe", "switch-like", "overrides"])
def test_backward_flops_are_those_that_torch_counts(name: str, train: dict[str, Any]) -> None:
    source = over(train, SPECS[name])
    assert forward_and_backward(model_of(train, SPECS[name])) == expected(planned(source))


@pytest.mark.parametrize("train", SUBSETS, ids=str)
@pytest.mark.parametrize("name", ["plain-moe", "gpt-oss-like", "deepseek-v3-like"])
def test_saved_bytes_are_what_autograd_keeps(name: str, train: dict[str, Any]) -> None:
    model, ids = model_of(train, SPECS[name]), token_ids()
    found = distinct_bytes(kept(lambda: model(ids)), own(model, ids))
    assert planned(over(train, SPECS[name])).costs["forward"].saved == found


@pytest.mark.parametrize(("train", "frozen"), FREEZES)
def test_gradients_and_state_are_of_what_is_trained(
    train: dict[str, Any], frozen: set[str]
) -> None:
    made = moegen.estimate(planned(over(train)), optimizer="adamw")
    lines = {line.name: line.bytes for line in made.training.lines}
    model = model_of(train)
    size = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert (lines["gradients"], lines["optimizer state"]) == (size, 2 * size)
    assert lines["parameters"] == sum(p.nbytes for p in model.parameters())
    assert made.counts.trained == size // 4


def test_without_layers_to_train_nothing_flows_back_through_them() -> None:
    costs = planned(over({"only": ["head"]})).costs["forward"]
    assert {role for role, work in costs.backward.items() if work} == {"head"}
    assert costs.backward["head"] == costs.flops["head"]  # its weight's gradient alone


# Rates


def test_groups_hold_each_trained_parameter_once() -> None:
    for train, _ in FREEZES:
        model = model_of(train)
        grouped = [p for group in model.parameter_groups(1.0) for p in group["params"]]
        assert len(grouped) == len({id(p) for p in grouped})
        assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("name", VARIED)
def test_groups_are_parts_by_role(name: str) -> None:
    model, plan = made(name), planned(name)
    counted: dict[str, int] = {}
    for group in model.parameter_groups(1.0):
        held = sum(p.numel() for p in group["params"])
        counted[group["name"]] = counted.get(group["name"], 0) + held
    by_part: dict[str, int] = {}
    for role, (count, _, _) in plan.root.totals().items():
        by_part[part_of(role)] = by_part.get(part_of(role), 0) + count
    assert counted == by_part


def test_rates_are_factors_on_what_the_optimizer_is_given() -> None:
    rates = {"experts": {"lr": 0.5, "weight_decay": 2.0}, "norms": {"weight_decay": 1.0}}
    model = model_of({"rates": {**rates, "router": 0.1}})
    held = {id(p): (g["lr"], g["weight_decay"]) for g in model.parameter_groups(0.01, 0.1)
            for p in g["params"]}  # fmt: skip
    for name, parameter in model.named_parameters():
        wanted = (0.01, 0.0 if name.endswith("bias") else 0.1)
        if name in named("experts", model):
            wanted = (0.005, 0.2)
        elif name in named("router", model):
            wanted = (0.001, wanted[1])
        assert held[id(parameter)] == pytest.approx(wanted), name


def test_vectors_and_biases_do_not_decay_unless_asked() -> None:
    model = model_of({})
    for group in model.parameter_groups(1.0, 1.0):
        for parameter in group["params"]:
            assert (parameter.dim() > 1) == (group["weight_decay"] == 1.0)


@pytest.mark.parametrize("part", ["experts", "router", "embedding"])
def test_gradients_are_scaled_by_part(part: str) -> None:
    plain, scaled = model_of({}), model_of({"rates": {part: {"gradient": 0.25}}})
    scaled.load_state_dict(plain.state_dict())
    (ours, out), (theirs, other) = (
        scaled.training_loss(token_ids()),
        plain.training_loss(token_ids()),
    )
    assert torch.equal(out.logits, other.logits)
    ours.backward()
    theirs.backward()
    whole = dict(plain.named_parameters())
    for name, parameter in scaled.named_parameters():
        factor = 0.25 if name in named(part, scaled) else 1.0
        torch.testing.assert_close(parameter.grad, whole[name].grad * factor)


# Expert output masking

LAYER = {"layers": 1, "ffn": None, "d_model": 16, "moe": moe(experts={"count": 4, "width": 8})}


def masked(train: dict[str, Any], *, training: bool = True, seed: int = 0) -> Tensor:
    """What a routed layer adds to 400 tokens [400, 16]."""
    source = spec("masked", LAYER, train={"masking": train} if train else {})
    layer = made(source).layers[0].moe.train(training)
    x = torch.randn(1, 400, 16, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(seed)
    return layer(x, torch.ones(400, dtype=torch.bool))[0][0].detach()


def test_a_token_loses_all_that_its_experts_give() -> None:
    whole, out = masked({}), masked({"rate": 0.3, "of": "tokens"})
    silent = (out == 0).all(-1)
    assert 0.2 < float(silent.float().mean()) < 0.4
    torch.testing.assert_close(out[~silent], whole[~silent] / 0.7)


def test_a_token_loses_what_some_of_its_experts_give() -> None:
    """Of two choices each: the sum of what is left is 0, 1 or 2 of the two parts."""
    whole, out = masked({}), masked({"rate": 0.3, "scale": "none"})
    silent = (out == 0).all(-1)
    same = torch.isclose(out, whole, atol=1e-6).all(-1)
    assert 0.04 < float(silent.float().mean()) < 0.15  # 0.09
    assert 0.4 < float(same.float().mean()) < 0.58  # 0.49


def test_single_values_are_lost() -> None:
    whole, out = masked({}), masked({"rate": 0.3, "of": "values"})
    mean = torch.stack([masked({"rate": 0.3, "of": "values"}, seed=s) for s in range(60)]).mean(0)
    assert 0.07 < float((out == 0).float().mean()) < 0.11  # both of two choices
    assert float((mean - whole).norm() / whole.norm()) < 0.15  # unbiased


@pytest.mark.parametrize(
    ("scale", "training", "evaluation"),
    [("training", 1 / 0.75, 1), ("evaluation", 1, 0.75), ("both", 1 / 0.75, 0.75), ("none", 1, 1)],
)
def test_what_makes_up_for_it(scale: str, training: float, evaluation: float) -> None:
    given = {"rate": 0.25, "of": "tokens", "scale": scale}
    whole = masked({})
    torch.testing.assert_close(masked(given, training=False), whole * evaluation)
    out = masked(given)
    left = (out != 0).any(-1)
    torch.testing.assert_close(out[left], whole[left] * training)


def test_decoding_is_evaluated_as_forward_is() -> None:
    source = spec("masked", {"moe": moe()}, train={"masking": {"rate": 0.5, "scale": "both"}})
    model, ids = made(source).eval(), token_ids()
    cache = model.new_cache(*ids.shape)
    steps = model.step(ids, torch.tensor(0), cache)
    torch.testing.assert_close(steps, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_is_shared_is_not_masked() -> None:
    source = spec("masked", {**LAYER, "moe": moe(shared=1)}, train={"masking": 0.999})
    layer = made(source).layers[0].moe.train()
    x = torch.randn(1, 50, 16)
    out, _ = layer(x, torch.ones(50, dtype=torch.bool))
    shared = layer.shared(x[0])
    assert torch.isclose(out[0], shared).all(-1).float().mean() > 0.9


# Losses and capacity of a phase


@pytest.mark.parametrize(
    ("on", "left"), [("all", {"balance", "z"}), ("none", set()), (["z"], {"z"})]
)
def test_losses_are_on_by_name(on: Any, left: set[str]) -> None:
    output = model_of({"losses": on})(token_ids())
    assert set(output.losses) == left
    assert all(set(record.losses) == left for record in output.routing)


def test_a_phase_has_a_capacity_of_its_own() -> None:
    phase = {"capacity": {"factor": 0.25, "eval_factor": "unlimited"}}
    model, before = model_of(phase), model_of({})
    dropped = [[float(r.dropped) for r in m(token_ids()).routing] for m in (model, before)]
    assert all(a > b for a, b in zip(*dropped, strict=True))
    assert all(float(r.dropped) == 0 for r in model.eval()(token_ids()).routing)


def test_a_capacity_of_some_layers_is_the_phases_too() -> None:
    overrides = [{"layers": [2], "capacity": 3.0}, {"layers": [1], "capacity": "none"}]
    model = {**WHOLE["model"], "moe": {**WHOLE["model"]["moe"], "overrides": overrides}}
    plan = planned({**WHOLE, "model": model, "train": {"capacity": 2.0}})
    factors = [one.moe.capacity and one.moe.capacity.factor for one in plan.spec.model.routed()]
    assert factors == [None, 2.0]


def test_packages_of_a_phase_say_what_they_were_made_of(tmp_path: Any) -> None:
    source = over({"preset": "st-moe-non-moe", "losses": ["z"]})
    folder = moegen.build(source, tmp_path / "whole")
    assert moegen.check(folder) == []
    assert moegen.load(folder / "spec.yaml").spec == moegen.load(source).spec


# What is refused, and what says nothing


def test_a_phase_trains_something() -> None:
    with pytest.raises(PlanError, match="nothing is left to train"):
        moegen.plan(over({"only": ["router"]}, SPECS["dense"]))


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"freeze": ["dense"]}, "the model has no parameters that are dense"),
        ({"rates": {"shared": 2.0}}, "the model has no parameters that are shared"),
        ({"capacity": 1.0}, "no layer has a capacity, so its factors say nothing"),
    ],
)
def test_what_says_nothing_is_warned_of(train: dict[str, Any], said: str) -> None:
    plan = planned(over(train, SPECS["plain-moe"]))
    assert said in [problem.message for problem in plan.warnings]


def test_a_dense_model_has_nothing_to_mask() -> None:
    plan = planned(over({"masking": 0.1}, SPECS["dense"]))
    assert any("nothing to mask" in problem.message for problem in plan.warnings)


def test_parts_have_a_word_for_every_role() -> None:
    roles = {role for name in VARIED for role in planned(name).root.totals()}
    assert {part_of(role) for role in roles} <= set(PARTS) - {"other"}
    assert part_of("something new") == "other"


# Presets


@pytest.mark.parametrize("name", presets.names("train"))
def test_a_preset_of_a_policy_trains(name: str) -> None:
    plan = planned(over({"preset": name}))
    assert not [problem for problem in plan.warnings if problem.path[0] == "train"]
    model = moegen.module(plan).Model().train()
    total, _ = model.training_loss(token_ids())
    total.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_presets_of_policies_say_what_their_papers_do() -> None:
    def said(name: str) -> Train:
        return moegen.load(over({"preset": name})).spec.train

    assert (said("switch-finetune").dropout.dense, said("switch-finetune").dropout.experts) == (
        0.1,
        0.4,
    )
    assert said("st-moe-non-moe").freeze == ("moe",)
    capacity = said("st-moe-ffn-only").capacity
    assert capacity is not None
    assert (capacity.factor, capacity.eval_factor) == (1.25, 2.0)
    assert said("flan-moe-freeze-router").freeze == ("router",)
    assert said("flan-moe-freeze-moe").losses == "all"
    masking = said("nllb-moe-transformers").masking
    assert masking is not None
    assert (masking.rate, masking.of, masking.scale) == (0.2, "values", "both")


def test_unknown_parts_are_refused_with_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'router'"):
        moegen.load(over({"freeze": ["rooter"]}))


# Beside fusions


@pytest.mark.parametrize("parameters", ["fp32", "bf16"])
def test_parts_whose_gradients_are_scaled_are_fused_as_ever(parameters: str) -> None:
    rates = {part: {"gradient": 0.5} for part in ("router", "experts")}
    source = {**over({"rates": rates}), "precision": {"parameters": parameters}}
    plan = lower(moegen.load(source), Workload(2, 12), backend("triton").fusions)
    layers = [c for c in plan.components if c.class_name == "MoE"]
    targets = {n.target for c in layers for n in c.programs["forward"].graph.nodes}
    assert {route, routed_feed_forward, scale_gradient} <= targets
