"""Properties of the whole way from spec to model, over specs that nobody wrote by hand."""

from __future__ import annotations

import ast
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_specs import spec

import moegen
from moegen.api import load
from moegen.backend import backend
from moegen.emit.package import package
from moegen.errors import SpecError
from moegen.parameters import count

FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

activations = st.sampled_from(["swiglu", "geglu", "reglu", "clamped_swiglu", "relu", "gelu"])
norms = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["rms", "layer"]),
        "placement": st.sampled_from(["pre", "post", "output", "sandwich"]),
    }
)
windows = st.none() | st.fixed_dictionaries({"size": st.integers(1, 9)})
grouped_query = st.fixed_dictionaries(
    {
        "kind": st.just("gqa"),
        "heads": st.sampled_from([2, 4]),
        "kv_heads": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([4, 6]),
        "bias": st.sampled_from(["none", "qkv", "all"]),
        "qk_norm": st.sampled_from(["none", "head", "full"]),
        "sinks": st.booleans(),
        "window": windows,
    }
)
latent = st.fixed_dictionaries(
    {
        "kind": st.just("mla"),
        "heads": st.integers(1, 3),
        "q_rank": st.none() | st.integers(1, 9),
        "kv_rank": st.integers(1, 9),
        "nope_dim": st.integers(1, 6),
        "rope_dim": st.sampled_from([2, 4]),
        "value_dim": st.integers(1, 6),
    }
)
routers = st.fixed_dictionaries(
    {
        "affinity": st.sampled_from(["softmax", "sigmoid"]),
        "score": st.fixed_dictionaries({"bias": st.booleans()}),
        "noise": st.sampled_from(["none", "jitter"]),
        "balance_bias": st.none() | st.just(0.01),
        "restrict": st.none() | st.just({"groups": 2, "keep": 1, "by": "max"}),
        "select": st.integers(1, 3),
        "gate": st.sampled_from(["none", "sum"]),
    }
)
capacities = st.none() | st.fixed_dictionaries(
    {
        "factor": st.sampled_from([0.5, 1.0, 2.0]),
        "convention": st.sampled_from(["per_token", "per_choice"]),
        "minimum": st.integers(0, 4),
        "rounding": st.sampled_from(["floor", "ceil", "nearest"]),
    }
)
mixtures = st.fixed_dictionaries(
    {
        "experts": st.fixed_dictionaries(
            {
                "count": st.sampled_from([4, 6]),
                "width": st.sampled_from([4, 10]),
                "activation": activations,
                "bias": st.booleans(),
            }
        ),
        "granularity": st.sampled_from([1, 2]),
        "shared": st.none() | st.just({"count": 2, "gate": True}),
        "router": routers,
        "capacity": capacities,
        "losses": st.sampled_from([{}, {"balance": 0.1, "z": 0.1}, {"sequence_balance": 0.1}]),
    }
)
specs = st.builds(
    lambda **model: spec("drawn", {**model, "d_model": 12, "ffn": 10}),
    layers=st.integers(1, 3),
    norm=norms,
    attention=grouped_query | latent,
    moe=st.none() | mixtures,
)


@FEW
@given(specs)
def test_any_valid_spec_becomes_a_model_that_trains(drawn: dict[str, Any]) -> None:
    try:
        plan = moegen.plan(drawn, batch=2, sequence=7)
    except SpecError:
        assume(False)
    model = moegen.module(plan).Model()
    counts = count(plan.root, plan.spec.model.tied)
    assert model.num_parameters() == counts.total
    assert counts.active <= counts.total
    torch.manual_seed(0)
    loss, output = model.training_loss(torch.randint(0, 61, (2, 7)))
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    for record in getattr(output, "routing", ()):
        chosen = plan.spec.model.moe.chosen
        assert int(record.load.sum()) == 2 * 7 * chosen
        assert 0 <= float(record.dropped) <= 1


@FEW
@given(specs)
def test_what_is_resolved_says_the_same_again(drawn: dict[str, Any]) -> None:
    try:
        loaded = load(drawn)
    except SpecError:
        assume(False)
    assert load(loaded.data).spec == loaded.spec


hostile = st.text(max_size=60) | st.sampled_from(
    [
        '"""\nimport os\nos.system("x")\n"""',
        "\\",
        "'''",
        "{x!r}",
        "a\r\nb",
        "\uff43\uff4c\uff41\uff53\uff53",
        "\u2028print(1)",
        "\\N{LATIN SMALL LETTER A}",
        "\x00",
    ]
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(hostile, hostile, hostile)
def test_no_text_of_a_spec_becomes_code(name: str, source: str, notes: str) -> None:
    drawn = {**spec("plain", {"layers": 1}), "source": source, "notes": notes}
    try:
        loaded = load(drawn)
    except SpecError:
        assume(False)
    plain = package(moegen.plan(spec("plain", {"layers": 1}), sequence=4), backend("eager"))
    files = package(moegen.plan(loaded, sequence=4), backend("eager")).files
    for file, text in files.items():
        if file.endswith(".py"):
            assert skeleton(text) == skeleton(plain.files[file])
    try:
        load({**drawn, "name": name})
    except SpecError:
        return
    assert name.isascii()
    assert "/" not in name


def skeleton(text: str) -> str:
    """The code of a module without what strings say."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)
