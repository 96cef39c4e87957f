"""How parameters start: every kind and every rule for a part, on emitted models."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny_models import imported, planned
from tiny_specs import moe, spec
from torch import Tensor

import moegen
from moegen.arch.init import ONES, ZEROS, Initialization, normal
from moegen.backend import backend
from moegen.emit.package import package
from moegen.errors import SpecError
from moegen.graph.component import Init
from moegen.graph.execute import Executable
from moegen.spec import presets

EXPERTS = {"count": 6, "width": 48, "bias": True}
ROUTED = moe(experts=EXPERTS, shared=1)
MODEL = {"d_model": 128, "vocab_size": 512, "layers": 1, "moe": ROUTED, "ffn": None}
ALL = {"layers": 2, "moe": {**ROUTED, "placement": {"last": 1}}, "ffn": 96}


def source(init: Any, model: dict[str, Any] | None = None, **rest: Any) -> dict[str, Any]:
    return spec("started", {**MODEL, **(model or {})}, init=init, **rest)


def started(init: Any, model: dict[str, Any] | None = None, **rest: Any) -> Any:
    torch.manual_seed(0)
    return imported(source(init, model, **rest)).Model().requires_grad_(False)


def text(init: Any, model: dict[str, Any] | None = None, file: str = "model.py") -> str:
    return package(planned(source(init, model)), backend("eager")).files[file]


def one(init: Any, **rest: Any) -> Any:
    """The routed layer of a model of one layer."""
    return started(init, **rest).layers[0].moe


def printed(init: Any, name: str, model: dict[str, Any] | None = None) -> dict[str, float]:
    """The numbers with which the emitted code draws a parameter."""
    call = re.search(rf"self\.{name},([^)]*)\)", text(init, model))
    assert call
    return {key: float(value) for key, value in re.findall(r"(\w+)=([-\w.]+)", call[1])}


def deviation(weight: Tensor) -> float:
    return float(weight.double().std())


DRAWN = ["normal", "truncated", "lecun", "uniform", "xavier", "orthogonal"]


# Kinds


def test_truncated_is_that_of_the_switch_transformer() -> None:
    """Case switch-init-std: fan_in 512."""
    model = {"d_model": 512, "vocab_size": 61}
    given = {"kind": "truncated", "scale": 0.1}
    numbers = printed(given, "router", model)
    sigma = 0.013975424859373685
    assert numbers == pytest.approx({"std": sigma, "a": -2 * sigma, "b": 2 * sigma}, rel=1e-12)
    assert printed({"kind": "truncated"}, "router", model)["std"] == pytest.approx(
        0.04419417382415922, rel=1e-12
    )
    weight = one(given, model=model).gate_up
    assert deviation(weight) == pytest.approx(0.012293142330160925, rel=0.01)
    assert 1.99 * sigma < float(weight.abs().max()) <= 2 * sigma * (1 + 1e-6)


def test_corrected_has_its_deviation_after_the_cut() -> None:
    model = {"d_model": 512, "vocab_size": 61}
    given = {"kind": "truncated", "scale": 0.1, "corrected": True}
    sigma = 0.015887923100085282
    numbers = printed(given, "router", model)
    assert numbers == pytest.approx({"std": sigma, "a": -2 * sigma, "b": 2 * sigma}, rel=1e-8)
    assert deviation(one(given, model=model).gate_up) == pytest.approx((0.1 / 512) ** 0.5, rel=0.01)


def test_fan_in_is_a_matrixs_last_dimension() -> None:
    layer = one({"kind": "truncated"})
    for weight in (layer.gate_up, layer.down, layer.shared.down, layer.router):
        sigma = weight.shape[-1] ** -0.5
        assert deviation(weight) == pytest.approx(0.8796 * sigma, rel=0.06)
        assert float(weight.abs().max()) <= 2 * sigma * (1 + 1e-6)


def test_lecun_is_normal_over_fan_in() -> None:
    layer = one({"kind": "lecun", "scale": 0.5})
    for weight in (layer.gate_up, layer.down):
        sigma = (0.5 / weight.shape[-1]) ** 0.5
        assert deviation(weight) == pytest.approx(sigma, rel=0.03)
        assert float(weight.abs().max()) > 3 * sigma


def test_uniform_is_that_of_torchs_own_layers() -> None:
    layer = one({"kind": "uniform"})
    for weight in (layer.down, layer.shared.down):
        alone = torch.nn.Linear(weight.shape[-1], weight.shape[-2]).weight.detach()
        assert float(weight.abs().max()) == pytest.approx(float(alone.abs().max()), rel=0.01)
        assert deviation(weight) == pytest.approx(deviation(alone), rel=0.03)
    small = one({"kind": "uniform", "factor": 0.001}).down
    assert float(small.abs().max()) == pytest.approx(0.001 * small.shape[-1] ** -0.5, rel=0.01)


@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_xavier_is_that_of_each_experts_own_matrices(gain: float) -> None:
    layer = one({"kind": "xavier", "gain": gain})
    gate = layer.gate_up[0].chunk(2)[0]
    for weight, matrix in ((layer.gate_up, gate), (layer.down, layer.down[0])):
        alone = torch.nn.init.xavier_uniform_(torch.empty_like(matrix), gain)
        assert float(weight.abs().max()) == pytest.approx(float(alone.abs().max()), rel=0.01)
        assert deviation(weight) == pytest.approx(deviation(alone), rel=0.05)
    router = torch.nn.init.xavier_uniform_(torch.empty_like(layer.router), gain)
    assert float(layer.router.abs().max()) == pytest.approx(float(router.abs().max()), rel=0.05)


@pytest.mark.parametrize("precision", [{}, {"parameters": "bf16"}])
def test_orthogonal_is_that_of_each_experts_own_matrices(precision: dict[str, str]) -> None:
    layer = one({"kind": "orthogonal", "gain": 0.3}, precision=precision)
    gates, ups = layer.gate_up.chunk(2, 1)
    matrices = [*gates, *ups, *layer.down, layer.router]
    for matrix in (m.double() for m in matrices):
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        same = torch.eye(len(wide), dtype=torch.float64) * 0.09
        torch.testing.assert_close(wide @ wide.T, same, rtol=0, atol=1e-3 if precision else 1e-6)
    assert len({float(m.flatten()[0]) for m in matrices}) > 10


def test_zeros_are_for_matrices_and_leave_norms_alone() -> None:
    model = started("zeros")
    starts = {name: sorted(set(p.unique().tolist())) for name, p in model.named_parameters()}
    ones = {name for name, values in starts.items() if values == [1.0]}
    assert ones == {"norm", "layers.0.attention_norm", "layers.0.ffn_norm"}
    assert all(values == [0.0] for name, values in starts.items() if name not in ones)


@pytest.mark.parametrize("kind", ["xavier", "orthogonal", "lecun", "truncated"])
def test_biases_and_norms_start_as_their_elements_say(kind: str) -> None:
    model = started(kind, {"norm": {"kind": "layer"}, "attention": {"heads": 4, "bias": "all"}})
    layer = model.layers[0]
    assert not layer.moe.gate_up_bias.any()
    assert not layer.attention.output_bias.any()
    assert not layer.ffn_norm_bias.any()
    assert (layer.ffn_norm == 1).all()


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("shape", [(5,), (1, 7), (4, 6), (6, 4), (3, 4, 6), (2, 3, 4, 6)])
def test_weights_of_any_shape_start(kind: str, shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    Initialization(kind=kind).of(shape, "other").start(weight)
    assert weight.all()


# Parts


def test_every_part_has_a_rule_of_its_own() -> None:
    parts = ("embedding", "head", "attention", "dense", "shared", "experts", "router")
    stds = {part: 0.01 * (n + 1) for n, part in enumerate(parts)}
    model = started({part: {"std": std} for part, std in stds.items()}, ALL)
    dense, routed = model.layers
    for part, weight in {
        "embedding": model.embedding,
        "head": model.head,
        "attention": routed.attention.query,
        "dense": dense.ffn.up,
        "shared": routed.moe.shared.up,
        "experts": routed.moe.gate_up,
        "router": routed.moe.router,
    }.items():
        assert deviation(weight) == pytest.approx(stds[part], rel=0.08), part


def test_a_rule_with_a_kind_stands_alone_and_one_without_changes_the_whole() -> None:
    whole = {"kind": "truncated", "scale": 0.1, "corrected": True, "factor": 0.5}
    rules = Initialization.model_validate(
        {**whole, "router": {"kind": "truncated"}, "experts": {"factor": 0.1}, "head": "normal"}
    )
    corrected = (0.1 / 64) ** 0.5 / 0.87962566103423978
    assert dict(rules.of((8, 64), "router").arguments)["std"] == 0.125
    experts = rules.of((4, 8, 64), "routed_experts", "up")
    assert dict(experts.arguments)["std"] == pytest.approx(0.1 * corrected)
    assert dict(rules.of((8, 64), "dense").arguments)["std"] == pytest.approx(0.5 * corrected)
    assert rules.of((8, 64), "head") == normal(0.02)
    assert rules.of((8, 64), "a plug-in's own") == rules.of((8, 64), "dense")


def test_a_router_of_zeros_starts_with_even_scores() -> None:
    """Shazeer et al. 2017 and Mod-Squad."""
    model = started({"router": "zeros"})
    assert not model.layers[0].moe.router.any()
    routing = model(torch.zeros(1, 4, dtype=torch.int64)).routing[0]
    assert routing.probability.tolist() == pytest.approx([1 / 6] * 6)


def test_noise_starts_as_the_router_unless_said() -> None:
    both = Initialization.model_validate({"router": "zeros"})
    assert both.of((8, 64), "router", "noise") == both.of((8, 64), "router", "router") == ZEROS
    apart = Initialization.model_validate({"router": {"std": 0.1}, "noise": "zeros"})
    assert apart.of((8, 64), "router", "noise") == ZEROS
    assert apart.of((8, 64), "router", "router") == normal(0.1)


def test_names_of_several_of_a_kind_tell_what_they_are() -> None:
    rules = Initialization.model_validate(
        {
            "kind": "orthogonal",
            "embedding": {"kind": "normal", "std": 0.5},
            "router": {"kind": "normal", "std": 0.1},
            "noise": "zeros",
            "experts": {"last": "zeros"},
        }
    )
    assert rules.of((4, 8, 64), "routed_experts", "down_2") == ZEROS
    assert dict(rules.of((4, 8, 64), "routed_experts", "gate_up_2").arguments) == {"parts": 2}
    assert rules.of((4, 2, 64), "router", "inner_noise") == ZEROS
    assert rules.of((4, 2, 64), "router", "inner_router") == normal(0.1)
    assert rules.of((4, 64), "router", "task_embedding") == normal(0.5)


def test_base_starts_as_the_identity() -> None:
    layer = one({"router": {"kind": "orthogonal", "gain": 0.1}, "experts": {"last": "zeros"}})
    assert not layer.down.any()
    assert deviation(layer.gate_up) == pytest.approx(0.02, rel=0.03)
    rows = layer.router @ layer.router.T
    torch.testing.assert_close(rows, torch.eye(6) * 0.01, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["normal", "truncated", "xavier", "orthogonal"])
def test_identical_experts_start_from_the_same_matrices(kind: str) -> None:
    """V-MoE."""
    init = {"experts": {"kind": kind, "identical": True}}
    model = started(init, {"layers": 2})
    alone = one({"experts": {"kind": kind}})
    for name in ("gate_up", "down"):
        weight, usual = getattr(model.layers[0].moe, name), getattr(alone, name)
        assert (weight == weight[0]).all()
        assert deviation(weight) == pytest.approx(deviation(usual), rel=0.05)
        assert not torch.equal(usual[0], usual[1])
        assert not torch.equal(weight, getattr(model.layers[1].moe, name))


@pytest.mark.parametrize("kind", DRAWN)
def test_a_factor_multiplies_what_a_kind_draws(kind: str) -> None:
    """Chen et al. 2022."""
    usual = one(kind)
    small = one({"kind": kind, "router": "zeros", "experts": {"factor": 0.001}})
    for name in ("gate_up", "down"):
        wanted = 0.001 * deviation(getattr(usual, name))
        assert deviation(getattr(small, name)) == pytest.approx(wanted, rel=0.02)
    assert deviation(small.shared.up) == pytest.approx(deviation(usual.shared.up), rel=0.05)


# Emission


INITS = [
    {},
    {"kind": "truncated", "scale": 0.1, "embedding": {"kind": "normal", "std": 1.0}},
    {"kind": "xavier", "router": {"kind": "orthogonal", "gain": 0.1}},
    {"kind": "orthogonal", "experts": {"identical": True, "last": "zeros"}},
]


@pytest.mark.parametrize("init", INITS, ids=lambda init: init.get("kind", "normal"))
def test_the_graph_starts_as_the_emitted_model(init: dict[str, Any]) -> None:
    model = started(init, ALL)
    graph = Executable(planned(source(init, ALL)).root)
    torch.manual_seed(0)
    graph.reset_parameters()
    assert graph.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(graph.state_dict()[name], value), name
    assert all(map(torch.equal, graph.buffers(), model.buffers()))


def test_emitted_code_says_it_shortly() -> None:
    init = {
        "router": {"kind": "orthogonal", "gain": 0.1},
        "experts": {"identical": True, "last": "zeros"},
        "shared": {"factor": 0.5},
    }
    emitted = text(init)
    for line in (
        "orthogonal_(self.router, gain=0.1)",
        "nn.init.normal_(self.gate_up[0], std=0.02)",
        "self.gate_up[1:] = self.gate_up[0]",
        "nn.init.zeros_(self.down)",
        "nn.init.normal_(self.up, std=0.01)",
    ):
        assert f"        {line}\n" in emitted
    assert "def orthogonal_(" in text(init, file="ops.py")
    assert "orthogonal_" not in text({"experts": "xavier"}, file="ops.py")


def test_an_element_may_name_any_function_of_torch() -> None:
    weight = torch.empty(3)
    Init("constant_", (("val", 2.0),)).start(weight)
    assert weight.tolist() == [2.0, 2.0, 2.0]
    ONES.start(weight)
    assert weight.tolist() == [1.0, 1.0, 1.0]


# Refusals


@pytest.mark.parametrize(
    ("init", "path", "sentence"),
    [
        ({"kind": "truncated", "std": 0.1}, "std", "std is for normal, not for truncated"),
        ({"scale": 0.1}, "scale", "scale is for truncated, lecun and uniform, not for"),
        ({"router": {"gain": 2.0}}, "router.gain", "gain is for xavier and orthogonal, not for"),
        ({"kind": "lecun", "corrected": False}, "corrected", "corrected is for truncated, not for"),
        ({"experts": {"last": {"kind": "zeros", "factor": 2.0}}}, "experts.last.factor", "factor"),
        ({"kind": "zeros", "dense": {"factor": 2.0}}, "dense.factor", "not for zeros"),
        ({"router": {"identical": True}}, "router.identical", "identical"),
        ({"router": "kaiming"}, "router", "kaiming"),
        ({"std": 0.0}, "std", "0"),
    ],
)
def test_settings_without_use_are_refused(init: Any, path: str, sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        moegen.load(source(init))
    (problem,) = caught.value.problems
    assert sentence in problem.message
    assert ".".join(map(str, problem.path)).startswith(f"init.{path}")


# Presets


PRESETS = {
    "switch": ("router", {"std": (0.1 / 128) ** 0.5}),
    "switch-flaxformer": ("router", {"std": 0.02}),
    "deepseek": ("router", {"std": 0.006}),
    "openmoe": ("router", {"std": (0.1 / 128) ** 0.5}),
    "soft-moe": ("router", {"std": 128**-0.5}),
    "chen2022": ("gate_up", {"b": 0.001 * 128**-0.5}),
    "hash": ("gate_up", {"b": (6 / (48 + 128)) ** 0.5}),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_start_parts_as_their_sources_do(name: str) -> None:
    part, wanted = PRESETS[name]
    found = printed({"preset": name}, part)
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)


def test_presets_of_starts_are_all_held_against_something() -> None:
    others = {"base", "v-moe", "shazeer2017"}
    assert set(presets.names("init")) == {*PRESETS, *others}
    base, same, zero = (one({"preset": name}) for name in ("base", "v-moe", "shazeer2017"))
    assert not base.down.any()
    assert float((base.router @ base.router.T).diagonal().mean()) == pytest.approx(0.01)
    assert all(torch.equal(expert, same.down[0]) for expert in same.down)
    assert not zero.router.any()
    assert zero.down.any()
