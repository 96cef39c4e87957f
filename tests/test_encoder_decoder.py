"""Encoder-decoders: emitted code, decoding, padding, losses of both stacks, and kernels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sequence_specs import LOSSES, SPECS, TARGET, batch, given, moe, spec
from tiny_models import BATCH, filled, imported, made, planned, twin

import moegen
from moegen.backend import backend
from moegen.emit.package import package
from moegen.emit.write import write
from moegen.graph.execute import tensors
from moegen.passes.sizes import prove_sizes

NAMES = sorted(SPECS)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Emitted code


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NAMES)
def test_emitted_equals_graph_bit_for_bit(name: str, training: bool) -> None:
    model = made(SPECS[name]).train(training)
    graph = twin(SPECS[name], model)
    torch.manual_seed(3)
    ours = model(*batch(), **given(name))
    torch.manual_seed(3)
    theirs = graph(*batch(), *given(name).values())
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert len(pairs) >= 1 + 3 * len(planned(SPECS[name]).spec.model.routed())
    for a, b in pairs:
        assert torch.equal(a, b)
    if training:
        ours.logits.float().square().mean().backward()
        theirs.logits.float().square().mean().backward()
        gradients = dict(graph.named_parameters())
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert torch.equal(parameter.grad, gradients[key].grad), key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Specs that differ most, emitted side by side."""
    place = tmp_path_factory.mktemp("emitted")
    for name in ("switch-like", "tables-of-layers", "turned", "mixed"):
        text = package(planned(SPECS[name]), backend("eager"))
        write(text, place / name.replace("-", "_"), force=False)
    return place


def run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_emitted_code_is_clean(folder: Path) -> None:
    run(sys.executable, "-m", "ruff", "check", "--isolated", ".", cwd=folder)
    run(sys.executable, "-m", "ruff", "format", "--isolated", "--check", ".", cwd=folder)


def test_emitted_code_is_typed(folder: Path) -> None:
    run(
        *(sys.executable, "-m", "mypy", "--strict"),
        *(p.name for p in folder.iterdir() if (p / "model.py").exists()),
        cwd=folder,
    )


@pytest.mark.parametrize("name", ["switch-like", "turned"])
def test_no_size_is_baked_in(name: str) -> None:
    prove_sizes(moegen.load(SPECS[name]))


def test_a_length_that_is_baked_in_is_found() -> None:
    """Were source and target of one length in the proof, their equality could hide."""
    model = moegen.load(SPECS["t5-like"]).spec.model
    symbol = object.__new__(type("Symbol", (), {"__add__": lambda self, n: ("longer", n)}))
    assert model.target(symbol) == ("longer", 1)


# Decoding

# A capacity is for forward passes; 16-bit formats differ by rounding.
DECODED = [n for n in NAMES if n not in {"switch-like", "mixed"}]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", DECODED)
def test_decoding_gives_the_logits_of_the_forward_pass(name: str, padded: bool) -> None:
    model = made(SPECS[name]).eval()
    ids, decoder_ids, mask, _ = batch()
    seen = mask if padded else None
    with torch.no_grad():
        whole = model(ids, decoder_ids, seen, **given(name)).logits
        memory = model.encode(ids, seen, **given(name))
        cache = model.new_cache(memory, 16, seen)
        first = model.step(decoder_ids[:, :4], torch.tensor(0), cache, **given(name))
        rest = [
            model.step(decoder_ids[:, i : i + 1], torch.tensor(i), cache, **given(name))
            for i in range(4, TARGET)
        ]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DECODED)
def test_what_is_generated_is_what_forward_finds_likeliest(name: str) -> None:
    model = made(SPECS[name]).eval()
    ids, _, mask, _ = batch()
    found = model.generate(ids, 6, mask, **given(name))
    written = torch.full((BATCH, 1), planned(SPECS[name]).spec.model.start_token)
    with torch.no_grad():
        for _ in range(6):
            likeliest = model(ids, written, mask, **given(name)).logits[:, -1].argmax(-1)
            written = torch.cat([written, likeliest.unsqueeze(-1)], 1)
    assert torch.equal(found, written[:, 1:])


def test_generation_ends_where_all_have_come_to_the_end() -> None:
    model = made(SPECS["t5-like"]).eval()
    ids = batch()[0]
    free = model.generate(ids, 8)
    end = int(free[0, 2])
    found = model.generate(ids, 8, end=end)
    for row, wanted in zip(found, free, strict=True):
        first = next((i for i, token in enumerate(wanted) if token == end), len(wanted))
        until = min(first + 1, found.shape[1])
        assert torch.equal(row[:until], wanted[:until])
        assert (row[until:] == end).all()


def test_samples_are_drawn_from_the_likeliest() -> None:
    model = made(SPECS["t5-like"]).eval()
    ids = batch()[0]
    with torch.no_grad():
        start = torch.zeros(BATCH, 1, dtype=torch.int64)
        likeliest = model(ids, start).logits[:, 0].topk(3).indices
    torch.manual_seed(0)
    drawn = [model.generate(ids, 1, temperature=2.0, top_k=3)[:, 0] for _ in range(40)]
    for row, allowed in enumerate(likeliest):
        assert {int(token[row]) for token in drawn} == set(allowed.tolist())


# Padding


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing_of_real_tokens(name: str) -> None:
    model = made(SPECS[name]).eval()
    ids, decoder_ids, mask, decoder_mask = batch()
    labels = decoder_ids.masked_fill(~decoder_mask, -100)
    with torch.no_grad():
        total, output = model.training_loss(ids, labels, mask, **given(name))
        other = torch.where(mask, ids, (ids + 5) % 61)
        again, same = model.training_loss(other, labels, mask, **given(name))
        assert torch.equal(total, again)
        assert torch.equal(output.logits[decoder_mask], same.logits[decoder_mask])
        longer = torch.cat((ids, ids), 1)
        more = torch.cat((mask, torch.zeros_like(mask)), 1)
        wide = torch.cat((labels, torch.full_like(labels, -100)), 1)
        padded, output_2 = model.training_loss(longer, wide, more, **given(name))
    tolerance = 2e-2 if name == "mixed" else 1e-5
    close = {"rtol": tolerance, "atol": tolerance}
    logits = output_2.logits[:, :TARGET]
    torch.testing.assert_close(logits[decoder_mask], output.logits[decoder_mask], **close)
    torch.testing.assert_close(padded, total, **close)
    for key, value in getattr(output, "losses", {}).items():
        torch.testing.assert_close(output_2.losses[key], value, **close)


def test_targets_are_shifted_behind_the_start_token() -> None:
    model = imported(SPECS["nllb-like"]).Model()
    labels = torch.tensor([[5, 6, 7, -100, -100], [8, 9, 10, 11, 12]])
    assert model.shifted(labels).tolist() == [[2, 5, 6, 7, 2], [2, 8, 9, 10, 11]]
    assert labels[0, 3] == -100


# Losses of both stacks


def test_losses_of_the_stacks_are_reduced_apart_and_added() -> None:
    changed = spec(
        "means",
        {
            "encoder": {"layers": 3, "placement": "all"},
            "decoder": {"layers": 2, "placement": {"last": 1}},
            "moe": moe(losses={"z": {"weight": 0.5, "reduction": "mean"}}),
        },
    )
    ids, decoder_ids, mask, decoder_mask = batch()
    out = made(changed)(ids, decoder_ids, mask, decoder_mask)
    values = [record.losses["z"] for record in out.routing]
    expected = 0.5 * (sum(values[:3]) / 3 + values[3])
    torch.testing.assert_close(out.losses["z"], expected)


def test_balance_biases_of_both_stacks_move_by_their_own_loads() -> None:
    balanced = moe(router={"select": 2, "balance_bias": 0.25}, placement={"last": 1})
    model = made(spec("balanced", {"moe": balanced}))
    ids, decoder_ids, mask, decoder_mask = batch()
    routing = model(ids, decoder_ids, mask, decoder_mask).routing
    sites = (model.encoder.layers[1].moe, model.decoder.layers[2].moe)
    before = [site.balance_bias.clone() for site in sites]
    model.update_balance(routing)
    for site, old, record in zip(sites, before, routing, strict=True):
        load = record.load.float()
        step = 0.25 * torch.sign(load.mean() - load)
        torch.testing.assert_close(site.balance_bias, old + step)
    assert model.routed_layers() == ["encoder 1", "decoder 2"]


# Kernels


def test_a_package_with_kernels_computes_what_one_without_does() -> None:
    routed = moe(losses=LOSSES, capacity=1.0, placement={"last": 1})
    small = spec("kernels", {"encoder": 1, "decoder": 1, "moe": routed, "ffn": None})
    plain = filled(moegen.module(small).Model)
    fused = filled(moegen.module(small, backend="triton").Model)
    fused.load_state_dict(plain.state_dict())
    ids, decoder_ids, mask, _ = batch()
    outs = [model(ids, decoder_ids, mask) for model in (plain, fused)]
    for out in outs:
        (out.logits.square().mean() + sum(out.losses.values())).backward()
    torch.testing.assert_close(outs[1].logits, outs[0].logits, rtol=1e-4, atol=1e-4)
    found = dict(fused.named_parameters())
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(found[key].grad, parameter.grad, rtol=1e-3, atol=1e-5)
    memory = [model.encode(ids, mask) for model in (plain, fused)]
    torch.testing.assert_close(memory[1], memory[0], rtol=1e-4, atol=1e-4)


# Warnings


def test_routing_that_looks_ahead_is_warned_of_in_the_decoder_alone() -> None:
    ahead = moe(router={"select": {"kind": "expert_choice", "factor": 2.0}})
    for side, expected in (("encoder", 0), ("decoder", 1)):
        others = {"encoder", "decoder"} - {side}
        stacks: dict[str, Any] = {side: {"layers": 2, "placement": "all"}}
        stacks |= {other: {"layers": 2, "placement": "none"} for other in others}
        plan = moegen.plan(spec("ahead", {**stacks, "moe": ahead}))
        assert len(plan.warnings) == expected, side
