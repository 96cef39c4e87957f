"""Every spec of the repository: exact counts, a model that can be made, and the way to YAML."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moegen
from moegen.parameters import Counts, count
from moegen.planner import Plan

ROOT = Path(__file__).parent.parent
FILES = {file.stem: file for file in sorted((ROOT / "specs").glob("*.yaml"))}
MODELS = yaml.safe_load((ROOT / "tests" / "data" / "models.yaml").read_text("utf-8"))["models"]


def slug(key: str) -> str:
    """The name of the spec of a reference: lower case, without parentheses."""
    return re.sub(r"[()]", "", key.lower())


REFERENCE: dict[str, dict[str, Any]] = {slug(model["key"]): model for model in MODELS}
COUNTED = sorted(FILES.keys() & REFERENCE.keys())

# Roles as the reference's `components` call them.
COMPONENTS = {
    "routed_experts": "routed_experts",
    "shared_experts": "shared_experts",
    "router": "router",
    "norms_by_name": "norms",
    "attention_or_mixer": "attention",
    "other_dense": "dense",
}
UNITS = {"M": 10**6, "B": 10**9, "T": 10**12}


def kind(name: str) -> str:
    """The kind of a spec's model."""
    return str(moegen.load(FILES[name]).spec.model.kind)


@cache
def planned(name: str) -> Plan:
    loaded = moegen.load(FILES[name])
    short = {"sequence": 8} if loaded.spec.model.unit == "token" else {}
    return moegen.plan(loaded, batch=1, **short)


@cache
def counted(name: str) -> Counts:
    plan = planned(name)
    return count(plan.root, plan.spec.model.tied)


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors; more threads wait for each other on a busy machine
    yield
    torch.set_num_threads(threads)
    planned.cache_clear()
    counted.cache_clear()


@pytest.mark.parametrize("name", FILES)
def test_loads_and_reads_back_as_it_was_resolved(name: str) -> None:
    loaded = moegen.load(FILES[name])
    again = moegen.load(loaded.data)
    assert again.data == loaded.data
    assert again.spec == loaded.spec
    assert loaded.spec.name == name
    first = FILES[name].read_text("utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=moegen.schema.json"


def test_every_reference_has_a_spec_of_its_family_and_year() -> None:
    assert len(REFERENCE) == len(MODELS) == 85
    assert sorted(REFERENCE) == COUNTED
    for name, known in REFERENCE.items():
        data = moegen.load(FILES[name]).data
        assert (data["family"], data["year"]) == (known["family"], known["year"]), name


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_the_reference_to_the_last_parameter(name: str) -> None:
    known, counts = REFERENCE[name], counted(name)
    assert counts.total - left_out(name) == known["verified_total"]
    if "verified_active" in known:  # not where every expert works for every token
        recurrent = known["family"] == "moe-lstm"  # whose active parameters are LSTMs and experts
        roles = ("embedding", "head", "router") if recurrent else ()
        unused = sum(counts.by_role[role].active for role in roles)
        assert counts.active - unused == known["verified_active"]
    for key, value in (
        ("verified_active_excl_input_embedding", counts.active_without_input_embedding),
        ("verified_active_excl_embeddings", counts.active_without_embeddings),
    ):
        assert value == known.get(key, value), key


@pytest.mark.parametrize("name", [n for n in COUNTED if "components" in REFERENCE[n]])
def test_counts_by_role_are_the_reference(name: str) -> None:
    known, counts = REFERENCE[name]["components"], counted(name)
    found = {theirs: share(counts, ours) for theirs, ours in COMPONENTS.items()}
    assert found == {key: known[key] for key in COMPONENTS}
    assert share(counts, "embedding") == known["input_embedding"]
    assert share(counts, "head") == known["output_head_untied"]
    assert counts.buffers == known["persistent_buffers_not_counted"]


def left_out(name: str) -> int:
    """Parameters that a published total, and so the reference, leaves out."""
    printed = moegen.load(FILES[name]).data.get("published") or {}
    return sum(share(counted(name), role) for role in printed.get("without", ()))


@pytest.mark.parametrize("name", [n for n in COUNTED if REFERENCE[n]["family"] == "moe-lstm"])
def test_lstms_and_experts_are_the_formula(name: str) -> None:
    known = REFERENCE[name]["hyperparameters"]
    d, experts = known["embed_dim"], known["n_experts"]
    hidden = int(known["expert"].split()[-3].split("-")[1])
    units = int(known["lstm"].split("LSTM-")[1].split()[0])
    lstm = 8 * units * d + (units * d if units != d else 0)
    counts = counted(name)
    assert share(counts, "recurrent") == 2 * lstm
    assert share(counts, "routed_experts") == experts * 2 * d * hidden
    outer = known["first_level_branching"] or 0
    assert share(counts, "router") == 2 * d * (experts + outer)
    assert counts.by_role["routed_experts"].active == 4 * 2 * d * hidden


def share(counts: Counts, role: str) -> int:
    return counts.by_role[role].count if role in counts.by_role else 0


@pytest.mark.parametrize("name", FILES)
def test_the_emitted_model_has_as_many_parameters(name: str) -> None:
    module = moegen.module(planned(name))
    try:
        with torch.device("meta"):
            model = module.Model()
        assert sum(p.numel() for p in model.parameters()) == counted(name).total
    finally:
        shutil.rmtree(Path(module.__file__ or "").parent.parent)


@pytest.mark.parametrize("name", FILES)
def test_published_figures_agree_or_the_note_says_why(name: str) -> None:
    printed, counts = moegen.load(FILES[name]).data.get("published") or {}, counted(name)
    active = (
        counts.active,
        counts.active_without_input_embedding,
        counts.active_without_embeddings,
    )
    wrong = []
    for key, values in (("total", (counts.total - left_out(name),)), ("active", active)):
        text = printed.get(key)
        if text is not None and not any(agrees(text, value) for value in values):
            wrong.append(key)
    assert bool(wrong) == bool(printed.get("note")), (wrong, counts)


def agrees(text: str, value: int) -> bool:
    """Whether a count rounds to a figure as printed, e.g. 46.7B, in the digits it has.

    Zeros at the end of a whole number are not taken for digits: 280B has two.
    """
    figure = Decimal(text[:-1])
    digits = figure.as_tuple().exponent
    assert isinstance(digits, int)
    if digits == 0:
        figure = figure.normalize()
        digits = int(figure.as_tuple().exponent)
    scaled = Decimal(value) / UNITS[text[-1]]
    return scaled.quantize(Decimal(1).scaleb(digits), ROUND_HALF_UP) == figure


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("46.7B", 46_702_792_704, True),
        ("46.7B", 46_750_000_000, False),
        ("280B", 277_000_000_000, True),
        ("280B", 274_000_000_000, False),
        ("2.0B", 1_991_242_240, True),
        ("20B", 13_957_857_280, False),
    ],
)
def test_agreement_is_of_the_printed_digits(text: str, value: int, expected: bool) -> None:
    assert agrees(text, value) is expected


def test_the_three_conventions_differ_by_the_tables() -> None:
    untied, tied = counted("mixtral-8x7b"), counted("granite-3.0-1b-a400m")
    table = 32000 * 4096
    assert untied.active - untied.active_without_input_embedding == table
    assert untied.active - untied.active_without_embeddings == 2 * table
    assert tied.active == tied.active_without_input_embedding
    assert tied.active - tied.active_without_embeddings == 49155 * 1024
    routed = untied.by_role["routed_experts"]
    assert Fraction(routed.active, routed.count) == Fraction(2, 8)
    assert routed.bytes == 2 * routed.count


def test_a_fraction_of_an_expert_is_counted_down() -> None:
    plan = moegen.plan(FILES["ec-0.1b-16e"], ["moe.router.select.factor=1.5"], sequence=8)
    routed = count(plan.root, True).by_role["routed_experts"]
    assert routed.active == math.floor(routed.count * Fraction(3, 32))


def test_the_rumour_is_fitted_to_its_arithmetic() -> None:
    counts = counted("gpt-4-rumor")
    experts = counts.by_role["routed_experts"]
    assert experts.count == 16 * 111 * 10**9
    assert experts.active == 2 * 111 * 10**9
    assert counts.total - experts.count == 55 * 10**9


SMALL: dict[str, Any] = {
    "model.vocab_size": 64,
    "model.d_model": 32,
    "model.layers": 2,
    "model.max_sequence": 32,
    "attention.heads": 4,
    "attention.head_dim": 8,
    "moe.experts.count": 8,
    "moe.experts.width": 16,
    "precision.parameters": "fp32",
}
FFN = {"ffn.width": 48}
ALONE = {  # specs that no other implementation is held against
    "grok-1": {"attention.kv_heads": 2},
    "gpt-4-rumor": {},
    "openmoe-8b": {**FFN, "model.layers": 6, "moe.extra.width": 24},
    "glam-64b-64e": FFN,
    "ec-0.1b-64e": FFN,
    "deepseekmoe-16b": FFN,
}


TINY = [name for name in FILES if name.endswith("tiny") and kind(name) == "decoder"]


@pytest.mark.parametrize("name", [*ALONE, *TINY])
def test_a_small_one_learns(name: str) -> None:
    torch.manual_seed(0)
    changes = {**SMALL, **ALONE[name]} if name in ALONE else {}
    model = moegen.module(FILES[name], changes).Model()
    ids = torch.randint(64, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        out = model(ids)
        loss = model.loss(out.logits, ids)
        (loss + sum(out.losses.values())).backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.95 * losses[0]
