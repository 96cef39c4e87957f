"""What plans say of encoder-decoders' work and memory, against torch's own counts and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from counted_flops import counter, declared
from kept_memory import distinct_bytes, kept, own
from sequence_specs import SOURCE, SPECS, TARGET, batch, given
from tiny_models import BATCH, made, planned

import moegen

NAMES = sorted(SPECS)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Costs


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    plan = planned(SPECS[name])
    model = made(SPECS[name]).train()
    ids, decoder_ids, _, _ = batch()
    with counter() as forward:
        out = model(ids, decoder_ids, **given(name))
    with counter() as backward:
        out.logits.float().square().mean().backward()
    ours, ours_backward = declared(plan.costs["forward"])
    more, more_backward = beyond_the_mask(plan.spec.model)
    assert ours + more == forward.get_total_flops()
    assert ours_backward + more_backward == backward.get_total_flops()


def beyond_the_mask(model: Any) -> tuple[int, int]:
    """What torch counts of the decoder's own attention beyond the pairs inside the mask.

    Biased attention is products one by one, so that all pairs are computed.
    """
    stack = model.stacks()["decoder"]
    if not (stack.attention.shared or stack.attention.relative):
        return 0, 0
    pairs = TARGET**2 - TARGET * (TARGET + 1) // 2
    one = 2 * BATCH * 4 * pairs * 16 * stack.layers
    return one, 2 * one


@pytest.mark.parametrize("name", NAMES)
def test_decoding_flops_are_those_that_torch_counts(name: str) -> None:
    plan, model = planned(SPECS[name]), made(SPECS[name]).eval()
    ids = batch()[0]
    with torch.no_grad():
        with counter() as reading:
            memory = model.encode(ids, **given(name))
            cache = model.new_cache(memory, TARGET)
        with counter() as step:
            model.step(ids[:, :1], torch.tensor(0), cache, **given(name))
    read = sum(sum(plan.costs[program].flops.values()) for program in ("encode", "new_cache"))
    assert read == reading.get_total_flops()
    assert sum(plan.costs["step"].flops.values()) == step.get_total_flops()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "mixed"])
def test_saved_bytes_are_what_autograd_keeps(name: str) -> None:
    model = made(SPECS[name]).train()
    ids, decoder_ids, _, _ = batch()
    found = kept(lambda: model(ids, decoder_ids, **given(name)))
    aside = own(model, ids, decoder_ids, *given(name).values())
    assert planned(SPECS[name]).costs["forward"].saved == distinct_bytes(found, aside)


def test_the_loss_keeps_what_autograd_keeps() -> None:
    model = made(SPECS["t5-like"])
    labels = batch()[1]
    logits = torch.randn(BATCH, TARGET, 61, requires_grad=True)
    found = kept(lambda: model.loss(logits, labels))
    saved = planned(SPECS["t5-like"]).costs["loss"].saved
    assert saved == distinct_bytes(found, [logits, labels])


# Estimates


def test_tokens_of_both_sides_are_told_apart() -> None:
    found = moegen.estimate(SPECS["t5-like"], batch=BATCH, sequence=SOURCE)
    projections, network = 4 * 2 * 32 * 32, 2 * 2 * 32 * 48
    read = 2 * (projections + 4 * 32 * SOURCE + network)
    own = projections + 4 * 32 * (TARGET + 1) // 2
    across = projections // 2 * (1 + Fraction(SOURCE, TARGET)) + 4 * 32 * SOURCE
    written = 3 * (own + across + network) + 2 * 32 * 61
    source, target = found.sides["source token"], found.sides["target token"]
    assert sum(part.forward for part in source.values()) == read
    assert sum(part.forward for part in target.values()) == written
    both = BATCH * (SOURCE * read + TARGET * written)
    assert found.forward_flops * BATCH * (SOURCE + TARGET) == both
    assert sum(part.backward for part in target.values()) > 2 * written - 1


def test_caches_of_both_sides_are_told_apart() -> None:
    found = moegen.estimate(SPECS["tables-of-layers"], batch=BATCH, sequence=SOURCE)
    one = 3 * 2 * BATCH * 2 * 8 * 4  # layers, keys and values, batch, kv heads, width, fp32
    lines = {line.name: line.bytes for line in found.inference.lines}
    assert lines["cache of the target"] == one * TARGET
    assert lines["cache of the source"] == one * SOURCE + BATCH * SOURCE * 4
    assert found.cache_bytes == one * (SOURCE + TARGET) + BATCH * SOURCE * 4


def test_a_plan_is_for_the_lengths_that_a_spec_serves() -> None:
    plan = moegen.plan(SPECS["t5-like"])
    assert (plan.workload.sequence, plan.spec.model.target(SOURCE)) == (SOURCE, TARGET)
    assert plan.results["forward"].logits.shape == (1, TARGET, 61)
    short = moegen.plan(SPECS["t5-like"], sequence=5)
    assert short.results["forward"].logits.shape == (1, 5, 61)


def test_checkpointed_layers_are_computed_once_more() -> None:
    plan = planned(SPECS["switch-like"])
    forward, backward = declared(plan.costs["forward"])
    again_forward, again_backward = declared(plan.costs["forward, checkpointed"])
    head = 2 * BATCH * TARGET * 32 * 61
    assert again_forward == forward
    assert again_backward - backward == forward - head
