"""FLOPs and parameters of plans against torch's own counter, and against formulas by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counted_flops import counter, declared, expected, forward_and_backward
from tiny_models import BATCH, LENGTH, made, planned, token_ids
from tiny_specs import SPECS, moe, spec
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from moegen.arch.latent_attention import LatentAttention
from moegen.ops.attention import causal_mask, seen_pairs, window_blocks

NAMES = sorted(SPECS)
HALVES = LENGTH * (LENGTH + 1) // 2


# The plan


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    assert forward_and_backward(made(name).train()) == expected(planned(name))


@pytest.mark.parametrize("name", NAMES)
def test_decoding_flops_are_those_that_torch_counts(name: str) -> None:
    model = made(name).eval()
    cache = model.new_cache(BATCH, LENGTH)
    with counter() as step, torch.no_grad():
        model.step(token_ids(length=1), torch.tensor(0), cache)
    assert sum(planned(name).costs["step"].flops.values()) == step.get_total_flops()


@pytest.mark.parametrize("name", ["dense", "plain-moe", "deepseek-v3-like", "gpt-oss-like"])
def test_checkpointing_costs_one_more_forward_pass_of_the_layers(name: str) -> None:
    plan = planned(name)
    forward, backward = declared(plan.costs["forward"])
    again_forward, again_backward = declared(plan.costs["forward, checkpointed"])
    model = plan.spec.model
    head = 2 * BATCH * LENGTH * model.d_model * model.vocab_size
    assert again_forward == forward
    assert again_backward - backward == forward - head


@pytest.mark.parametrize("name", ["dense", "plain-moe", "switch-like"])
def test_the_recomputed_pass_is_what_torch_counts(name: str) -> None:
    model = made(name).train()
    model.checkpoint_layers()
    with set_checkpoint_early_stop(False):  # it would stop before what backward does not need
        found = forward_and_backward(model)
    assert found == declared(planned(name).costs["forward, checkpointed"])


# Pairs


def mask_of(length: int, window: int | None) -> Tensor:
    """Which keys each query sees, one by one."""
    mask = causal_mask(length, torch.device("cpu"))
    if window is not None:
        positions = torch.arange(length)
        mask &= positions.unsqueeze(-1) - positions < window
    return mask


@pytest.mark.parametrize("window", [None, 1, 2, 5, 12, 40])
@pytest.mark.parametrize("length", [1, 2, 5, 12, 23])
def test_seen_pairs_are_the_ones_of_an_explicit_mask(length: int, window: int | None) -> None:
    assert seen_pairs(length, window) == int(mask_of(length, window).sum())
    if window is not None:
        q = torch.zeros(1, 1, length, 2)
        *_, mask = window_blocks(q, q, q, window)
        size = window
        padding = -(-length // size) * size - length  # rows of the last block beyond the end
        beyond = sum(min(window, length + 1 + row) for row in range(padding))
        assert int(mask.sum()) == seen_pairs(length, window) + beyond


# Formulas by hand


def test_attention_flops_are_projections_and_the_causal_half_of_all_pairs() -> None:
    d, heads, kv_heads, width = 32, 4, 2, 8
    flops = planned("plain-moe").costs["forward"].flops["attention"]
    weights = d * heads * width + 2 * d * kv_heads * width + heads * width * d
    tokens = BATCH * LENGTH
    core = 4 * BATCH * HALVES * heads * width
    assert flops == 2 * (2 * tokens * weights + core)  # two layers


def test_window_flops_count_w_keys_once_a_sequence_is_that_long() -> None:
    size = 5
    windowed = spec("w", {"attention": {"heads": 4, "kv_heads": 2, "window": size}})
    plain = planned("dense").costs["forward"].flops["attention"]
    seen = size * LENGTH - size * (size - 1) // 2
    less = 2 * 4 * BATCH * (HALVES - seen) * 4 * 8
    assert planned(windowed).costs["forward"].flops["attention"] == plain - less


def test_latent_attention_is_naive_in_training_and_absorbed_in_decoding() -> None:
    d, heads, q_rank, kv_rank, nope, rope, value = 32, 4, 24, 16, 8, 8, 12
    tokens, layers = BATCH * LENGTH, 4
    before = d * q_rank + q_rank * heads * (nope + rope) + d * (kv_rank + rope)
    after = heads * value * d
    expand = kv_rank * heads * (nope + value)
    costs = planned("deepseek-v3-like").costs
    naive = 2 * BATCH * HALVES * heads * (nope + rope + value)
    training = 2 * tokens * (before + expand + after) + naive
    assert costs["forward"].flops["attention"] == layers * training
    absorbed = 2 * heads * LENGTH * (kv_rank + rope + kv_rank)
    turned = 2 * heads * (nope * kv_rank + kv_rank * value)
    decoding = 2 * (before + after) + turned + absorbed
    assert costs["step"].flops["attention"] == layers * BATCH * decoding


def test_backward_of_attention_has_three_products_as_wide_as_keys_and_two_as_values() -> None:
    costs = planned("deepseek-v3-like").costs["forward"]
    core = 2 * BATCH * HALVES * 4 * 4
    linear = costs.flops["attention"] - core * (16 + 12)
    assert costs.backward["attention"] == 2 * linear + core * (3 * 16 + 2 * 12)


def test_routed_flops_are_those_of_the_chosen_experts() -> None:
    costs, tokens, d, width = planned("plain-moe").costs["forward"], BATCH * LENGTH, 32, 16
    assert costs.flops["routed_experts"] == 2 * (6 * tokens * 2 * d * width)
    assert costs.flops["router"] == 2 * (2 * tokens * d * 8)
    assert costs.backward["routed_experts"] == 2 * costs.flops["routed_experts"]


def test_granularity_keeps_the_flops_of_experts_and_grows_the_routers() -> None:
    coarse = planned(spec("coarse", {"moe": moe()})).costs["forward"].flops
    fine = planned(spec("fine", {"moe": moe(granularity=4)})).costs["forward"].flops
    assert fine["routed_experts"] == coarse["routed_experts"]
    assert fine["router"] == 4 * coarse["router"]


def test_a_head_costs_the_same_tied_or_not() -> None:
    tied = spec("tied", {"head": {"tied": True}})
    ours = planned(tied).costs["forward"]
    assert ours.flops["head"] == planned("dense").costs["forward"].flops["head"]
    assert ours.backward["head"] == planned("dense").costs["forward"].backward["head"]


# Parameters


def by_role(name: str) -> dict[str, int]:
    return {role: count for role, (count, _, _) in planned(name).root.totals().items()}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_attention_are_the_formulas(name: str) -> None:
    model = planned(name).spec.model
    assert by_role(name)["attention"] == sum(
        attention_parameters(model.attention, model.d_model) for _ in range(model.layers)
    )


def attention_parameters(attention: Any, d: int) -> int:
    """d H dh + 2 d G dh + H dh d with biases, or MLA's; norms have a role of their own."""
    heads = attention.heads
    if isinstance(attention, LatentAttention):
        nope, rope, value = attention.nope_dim, attention.rope_dim, attention.value_dim
        rank, inner = attention.q_rank, heads * (nope + rope)
        queries = d * rank + rank * inner if rank else d * inner
        latent = d * (attention.kv_rank + rope) + attention.kv_rank * heads * (nope + value)
        return int(queries + latent + heads * value * d)
    groups, width = attention.kv_heads or heads, attention.head_dim or d // heads
    projections = 2 * d * heads * width + 2 * d * groups * width
    biases = {"none": 0, "qkv": heads * width + 2 * groups * width}
    biases["all"] = biases["qkv"] + d
    return int(projections + biases[attention.bias] + (heads if attention.sinks else 0))


@pytest.mark.parametrize("name", [n for n in NAMES if "moe" in SPECS[n]["model"]])
def test_parameters_of_experts_are_the_formulas_and_active_ones_those_chosen(name: str) -> None:
    plan = planned(name)
    routed = router = active = 0
    for layer in (one.moe for one in plan.spec.model.routed()):
        count, width, d = layer.num_experts, layer.expert_width, plan.spec.model.d_model
        into = 2 if layer.experts.activation.gated else 1
        one = (into + 1) * d * width
        one += into * width + d if layer.experts.bias else 0
        routed += count * one
        router += count * d + (count if layer.router.score.bias else 0)
        met = layer.chosen or int(2.0 * layer.granularity)  # expert choice: its factor
        active += met * one
    totals = plan.root.totals()
    assert totals["routed_experts"][:2] == (routed, active)
    assert totals["router"][:2] == (router, router)


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_counted_once(name: str) -> None:
    model, roles = planned(name).spec.model, by_role(name)
    table = model.vocab_size * model.d_model
    assert roles["embedding"] == table
    bias = model.vocab_size if model.head.bias else 0
    assert roles.get("head", 0) == (0 if model.head.tied else table + bias)


def test_a_plans_numbers_grow_with_its_batch_alone_where_they_should() -> None:
    one, two = (planned("plain-moe", batch=n).costs["forward"] for n in (1, 2))
    assert declared(two) == tuple(2 * value for value in declared(one))
