"""Worked cases of what holds for whole models: starts, placements, dropout, sizes and costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_placement import INSERTED, RULES
from torch.overrides import TorchFunctionMode
from worked_numbers import Case, decoder, emitted, same, worked

import moegen

MIXTURE = {"experts": {"count": 4, "width": 4, "activation": "relu"}, "router": {"select": 1}}


@worked("moe-layer-placement")
def test_published_placements_are_those_of_the_reference(case: Case) -> None:
    # test_placement.py holds emitted models against these lists.
    case.holds(**{name: layers for name, (*_, layers) in (RULES | INSERTED).items()})


def started(fan_in: int, monkeypatch: pytest.MonkeyPatch, **init: Any) -> dict[str, float]:
    """What the emitted router's truncated normal distribution is given."""
    calls: list[dict[str, float]] = []
    package = emitted(decoder(MIXTURE, fan_in, init={"kind": "truncated", **init}))
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda _, **given: calls.append(given))
    package.model.MoE()
    return calls[0]


@worked("switch-init-std")
def test_deviations_of_the_truncated_start(case: Case) -> None:
    fan_in = case.inputs["fan_in"]
    with pytest.MonkeyPatch.context() as patch:
        small = started(fan_in, patch, scale=0.1)
        case.holds(sigma_s0p1=small["std"], sigma_s1p0=started(fan_in, patch, scale=1.0)["std"])
        jax = started(fan_in, patch, scale=0.1, corrected=True)
    case.holds(jax_variance_scaling_sigma=jax["std"])
    cut = small["b"] / small["std"]
    assert small["a"] == -small["b"]
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    kept = math.erf(cut / math.sqrt(2))
    after = small["std"] * math.sqrt(1 - 2 * cut * density / kept)
    case.holds(actual_std_after_truncation_s0p1=after)


class Rates(TorchFunctionMode):
    """Notes the rates of dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout:
            self.seen.append(kwargs["p"])
        return func(*args, **(kwargs or {}))


@worked("finetune-dropout-map")
def test_dropout_is_higher_inside_experts(case: Case) -> None:
    train = {"dropout": {"dense": 0.1, "experts": 0.4}}
    attention = {"heads": 1, "head_dim": 2, "rope": None}
    stack = {"layers": 2, "ffn": 4, "attention": attention, "train": train}
    code = emitted(decoder({**MIXTURE, "placement": {"last": 1}}, 4, **stack)).model
    x, valid = torch.randn(1, 3, 4, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    assert case.inputs["modules"] == ["attn", "dense_ffn", "expert_ffn"]
    with Rates() as rates:
        code.DenseBlock()(x, code.Context(valid=valid))
        code.MoE()(x, valid)
    case.holds(switch=rates.seen)


@worked("kv-cache-arithmetic")
def test_bytes_of_the_cache(case: Case) -> None:
    width, layers = case.inputs["head_dim"], case.inputs["layers"]
    assert case.inputs["bytes"] == torch.bfloat16.itemsize
    each, whole = [], []
    for kv_heads in case.inputs["kv_heads"]:
        attention = {"heads": 32, "kv_heads": kv_heads, "head_dim": width}
        sizes = {"layers": layers, "max_sequence": 32768, "precision": {"parameters": "bf16"}}
        package = emitted(decoder(None, 2, ffn=2, attention=attention, **sizes))
        with torch.device("meta"):
            model = package.Model()
        for length, found in ((1, each), (32768, whole)):
            cache = model.new_cache(1, length)
            found.append(sum(t.numel() * t.dtype.itemsize for layer in cache for t in layer))
    case.holds(bytes_per_token=each, gib_at_32768_tokens=[size / 2**30 for size in whole])


@worked("moe-flop-parity")
def test_products_of_dense_and_routed_layers(case: Case) -> None:
    width, hidden, experts = (case.inputs[name] for name in ("d_model", "d_ff", "experts"))
    network = {"width": hidden, "activation": "relu"}
    specs = {
        "dense": decoder(None, width, ffn=network),
        **{
            f"top{k}": decoder(
                {"experts": {"count": experts, **network}, "router": {"select": k}}, width
            )
            for k in (1, 2)
        },
    }
    for name, spec in specs.items():
        roles = moegen.estimate(spec, sequence=4).flops
        ours = [roles[r].forward for r in ("dense", "routed_experts", "router") if r in roles]
        same(int(sum(ours) / 2), case.want(f"{name}_macs"))
    for name, network_name, of in (("dense", "FeedForward", "dense"), ("moe", "MoE", "top1")):
        with torch.device("meta"):
            made = getattr(emitted(specs[of]).model, network_name)()
        same(sum(p.numel() for p in made.parameters()), case.want(f"{name}_params"))


@worked("activated-flops-ratio")
def test_share_of_experts_that_a_token_meets(case: Case) -> None:
    shares = []
    for k, count in case.inputs["kE"]:
        moe = {"experts": {"count": count, "width": 1}, "router": {"select": k}}
        totals = moegen.plan(decoder(moe, 2), sequence=4).root.totals()
        parameters, active, _ = totals["routed_experts"]
        shares.append(active / parameters)
    case.holds(fraction=shares)
