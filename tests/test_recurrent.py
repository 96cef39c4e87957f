"""Recurrent models against torch.nn.LSTM, a reference step by step, counters and formulas."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from counted_flops import counter, declared
from kept_memory import distinct_bytes, kept, own
from tiny_models import filled, imported, made, planned, token_ids, twin
from torch import Tensor, nn

import moegen
from moegen.backend import backend
from moegen.emit.package import package
from moegen.emit.write import write
from moegen.graph.execute import tensors
from moegen.ops.op import OPS
from moegen.ops.recurrence import lstm, lstm_step
from moegen.ops.sampling import log_expected, log_uniform_words, sampled_softmax_loss
from moegen.passes.sizes import prove_sizes

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    # Dynamo makes an object of every autograd.Function that it meets, which torch itself warns of.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

BASE: dict[str, Any] = {"kind": "recurrent", "vocab_size": 61, "d_model": 32, "layers": 2}
FLAT = {"preset": "shazeer2017-lm", "experts": {"count": 8, "width": 16}}
NESTED = {
    "preset": "shazeer2017-hierarchical",
    "experts": {"count": 4, "width": 16, "nested": {"count": 4}},
}
HASHED = {
    "placement": {"insert": 2},
    "experts": {"count": 4, "width": 16},
    "router": {"score": "table", "select": 1, "gate": "constant"},
}
BALANCED = {
    "placement": {"insert": 1},
    "experts": {"count": 4, "width": 16},
    "router": {"affinity": "sigmoid", "balance_bias": 0.01, "select": 2, "gate": "sum"},
    "losses": {"balance": 0.01},
}


def spec(name: str, model: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"name": name, "model": {**BASE, **model}, **rest}


SPECS = {
    s["name"]: s
    for s in (
        spec("plain-lstm", {"layers": 3}),
        spec("lstm-moe", {"moe": FLAT}),
        spec("lstmp-nested", {"recurrence": {"width": 48, "bias": False}, "moe": NESTED}),
        spec(
            "sampled",
            {"moe": FLAT, "moe_output": "none", "head": {"sampled": 20, "bias": True}},
            train={"dropout": {"dense": 0.2}},
        ),
        spec("hashed-tied", {"layers": 3, "moe": HASHED, "head": {"tied": True}}),
        spec("balanced", {"moe": BALANCED}),
        spec("lstm-bf16", {"moe": FLAT}, precision={"compute": "bf16"}),
    )
}
NAMES = sorted(SPECS)


@contextmanager
def steps_one_by_one() -> Iterator[None]:
    """Without oneDNN, whose kernel torch neither counts nor sees inside of."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def weights_of(reference: nn.LSTM) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A layer's parameters as the ops take them."""
    held = dict(reference.named_parameters())
    projection = held.pop("weight_hr_l0", None)
    return list(held.values()), {} if projection is None else {"weight_hr": projection}


LAYERS = [(12, 0, True), (12, 0, False), (20, 12, True), (20, 12, False)]


@pytest.mark.parametrize(("units", "projected", "bias"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_lstm_is_torchs_bit_for_bit(
    units: int, projected: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    theirs = nn.LSTM(12, units, bias=bias, batch_first=True, proj_size=projected).to(dtype)
    weights, named = weights_of(theirs)
    x = torch.randn(3, 9, 12, dtype=dtype, requires_grad=True)
    out, (hidden, cell) = theirs(x)
    sought = [x, *theirs.parameters()]
    expected = torch.autograd.grad(out.square().sum(), sought)
    ours = lstm(x, *weights, **named)
    assert torch.equal(ours, out)
    found = torch.autograd.grad(ours.square().sum(), sought)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    state = torch.zeros_like(hidden[0]), torch.zeros_like(cell[0])
    with torch.no_grad():
        parts = [lstm_step(part, *state, *weights, **named) for part in x.split((4, 1, 4), 1)]
    rough = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(torch.cat(parts, 1), out.detach(), rtol=rough, atol=rough)
    torch.testing.assert_close(state[0], hidden[0].detach(), rtol=rough, atol=rough)
    torch.testing.assert_close(state[1], cell[0].detach(), rtol=rough, atol=rough)


def step_by_step(x: Tensor, w: list[Tensor], bias: bool, projection: Tensor | None) -> Tensor:
    """Hochreiter and Schmidhuber's cell with a forget gate, sums written out, one by one."""
    batch, length, _ = x.shape
    units = w[1].shape[0] // 4
    outputs = torch.zeros(batch, length, w[1].shape[1], dtype=x.dtype)
    for sequence in range(batch):
        last, cell = torch.zeros(w[1].shape[1]).double(), torch.zeros(units).double()
        for t in range(length):
            z = w[0] @ x[sequence, t] + w[1] @ last
            z = z + w[2] + w[3] if bias else z
            enter, forget, new, leave = (z[i * units : (i + 1) * units] for i in range(4))
            cell = cell / (1 + (-forget).exp()) + new.tanh() / (1 + (-enter).exp())
            last = cell.tanh() / (1 + (-leave).exp())
            last = last if projection is None else projection @ last
            outputs[sequence, t] = last
    return outputs


@pytest.mark.parametrize(("units", "projected", "bias"), LAYERS)
def test_an_lstm_is_its_formula(units: int, projected: int, bias: bool) -> None:
    torch.manual_seed(1)
    layer = nn.LSTM(12, units, bias=bias, batch_first=True, proj_size=projected).double()
    weights, named = weights_of(layer)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = step_by_step(x, weights, bias, named.get("weight_hr"))
        torch.testing.assert_close(lstm(x, *weights, **named), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("units", "projected", "bias"), LAYERS)
def test_backward_keeps_what_the_steps_have(units: int, projected: int, bias: bool) -> None:
    """Torch's steps one by one keep all but the last step's output, and cells before each."""
    layer = nn.LSTM(12, units, bias=bias, batch_first=True, proj_size=projected)
    weights, named = weights_of(layer)
    x = torch.randn(3, 9, 12, requires_grad=True)
    with steps_one_by_one():
        found = distinct_bytes(kept(lambda: lstm(x, *weights, **named)), layer.parameters())
    facts = OPS["lstm"]
    assert facts.extra is not None
    assert facts.saves == ("x", "weight_ih", "weight_hh", "weight_hr", "out")
    outputs = 3 * 9 * (projected or units) * 4
    assert facts.extra(x, *weights, **named) + x.numel() * 4 + outputs == found


# Models


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NAMES)
def test_emitted_equals_graph_bit_for_bit(name: str, training: bool) -> None:
    source = SPECS[name]
    model = made(source).train(training)
    graph = twin(source, model)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 9:] = False
    torch.manual_seed(3)
    ours = model(token_ids(), mask)
    loss = model.loss(ours[0], token_ids())
    torch.manual_seed(3)
    theirs = graph(token_ids(), mask)
    other = graph(theirs[0], token_ids(), program="loss")
    pairs = list(zip(tensors((ours, loss)), tensors((theirs, other)), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    if training:
        (loss + ours[0].float().square().mean()).backward()
        (other + theirs[0].float().square().mean()).backward()
        gradients = dict(graph.named_parameters())
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert torch.equal(parameter.grad, gradients[key].grad), key


@pytest.mark.parametrize("name", NAMES)
def test_decoding_continues_the_forward_pass(name: str) -> None:
    model, ids = made(SPECS[name]).eval(), token_ids()
    with torch.no_grad():
        out = model(ids)
        whole = model.logits(out[0]) if "sampled" in name else out.logits
        cache = model.new_cache(2, 12)
        first = model.step(ids[:, :7], torch.tensor(0), cache)
        rest = [model.step(ids[:, i : i + 1], torch.tensor(i), cache) for i in range(7, 12)]
    rough = 3e-2 if "bf16" in name else 1e-4
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, rtol=rough, atol=rough)


def test_balance_biases_are_moved() -> None:
    model = made(SPECS["balanced"]).train()
    before = model.layers[1].moe.balance_bias.clone()
    _, out = model.training_loss(token_ids())
    model.update_balance(out.routing)
    load = out.routing[0].load.float()
    moved = 0.01 * (load.mean() - load).sign()
    torch.testing.assert_close(model.layers[1].moe.balance_bias, before + moved)


def test_mixtures_stand_between_layers_and_only_there() -> None:
    kinds = {}
    for layers, extra in ((2, 1), (4, 1), (4, 3), (5, 2)):
        moe = {**BALANCED, "placement": {"insert": extra}}
        stack = planned(spec("places", {"layers": layers, "moe": moe})).spec.model.stack()
        kinds[layers, extra] = "".join(type(layer).__name__[0] for layer in stack)
    assert kinds == {(2, 1): "RMR", (4, 1): "RRMRR", (4, 3): "RMRMRMR", (5, 2): "RMRRMRR"}


def test_generate_takes_the_likeliest_words_of_the_forward_pass() -> None:
    model, ids = made(SPECS["lstm-moe"]).eval(), token_ids(length=4)
    text = model.generate(ids, 5)
    with torch.no_grad():
        assert torch.equal(model(text).logits[:, 3:-1].argmax(-1), text[:, 4:])


def test_a_state_is_as_large_for_any_length() -> None:
    short, long = (planned(SPECS["lstmp-nested"], length=n) for n in (4, 400))
    sizes = {p.workload.sequence: moegen.estimate(p).cache_bytes for p in (short, long)}
    assert sizes == {4: 2 * 2 * (32 + 48) * 4, 400: 2 * 2 * (32 + 48) * 4}
    made_ = moegen.estimate(long)
    assert made_.cache_bytes_per_token is None
    assert made_.recurrent_steps == 2 * 400


def test_padding_changes_nothing_before_it() -> None:
    model, ids = made(SPECS["lstm-moe"]).eval(), token_ids()
    other = ids.clone()
    other[:, 8:] = 5
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, :8], model(other).logits[:, :8])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "lstm-bf16"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    plan, model = planned(SPECS[name]), made(SPECS[name]).train()
    with steps_one_by_one():
        with counter() as forward:
            out = model(token_ids())
        with counter() as backward:
            loss = out[0].float().square().mean() + sum(getattr(out, "losses", {}).values())
            loss.backward()
        assert declared(plan.costs["forward"]) == (
            forward.get_total_flops(),
            backward.get_total_flops(),
        )
        with counter() as loss:
            again = model.loss(out[0].detach().requires_grad_(), token_ids())
        with counter() as backward:
            again.backward()
        found = loss.get_total_flops(), backward.get_total_flops()
        assert declared(plan.costs["loss"]) == found
        cache = model.new_cache(2, 12)
        with counter() as step, torch.no_grad():
            model.eval().step(token_ids(length=1), torch.tensor(0), cache)
    assert sum(plan.costs["step"].flops.values()) == step.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_saved_bytes_are_what_autograd_keeps(name: str) -> None:
    plan, model, ids = planned(SPECS[name]), made(SPECS[name]).train(), token_ids()
    with steps_one_by_one():
        found = kept(lambda: model(ids))
        first = model(ids)[0].detach().requires_grad_()
        loss = kept(lambda: model.loss(first, ids))
    assert plan.costs["forward"].saved == distinct_bytes(found, own(model, ids))
    assert plan.costs["loss"].saved == distinct_bytes(loss, own(model, ids))


@pytest.mark.parametrize("freeze", ["embedding", "recurrent", "router", "experts"])
def test_frozen_parts_cost_no_backward(freeze: str) -> None:
    source = {**SPECS["lstm-moe"], "train": {"freeze": [freeze]}}
    plan, model = planned(source), made(source).train()
    with steps_one_by_one():
        out = model(token_ids())
        with counter() as backward:
            out[0].square().mean().backward()
    assert declared(plan.costs["forward"])[1] == backward.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_general(name: str) -> None:
    prove_sizes(moegen.load(SPECS[name]))


def test_emitted_code_is_clean_and_typed(tmp_path: Path) -> None:
    for name in NAMES:
        write(
            package(planned(SPECS[name]), backend("eager")),
            tmp_path / name.replace("-", "_"),
            force=False,
        )
    folders = sorted(path.name for path in tmp_path.iterdir())
    for command in (
        ("ruff", "check", "--isolated", "."),
        ("ruff", "format", "--isolated", "--check", "."),
        ("mypy", "--strict", *folders),
    ):
        done = subprocess.run(
            (sys.executable, "-m", *command), cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["lstm-moe", "lstmp-nested"])
def test_a_package_with_kernels_computes_what_one_without_does(name: str) -> None:
    plain = filled(moegen.module(SPECS[name]).Model).eval()
    fused = filled(moegen.module(SPECS[name], backend="triton").Model).eval()
    fused.load_state_dict(plain.state_dict())
    outs = [model(token_ids(1, 6)) for model in (plain, fused)]
    for out in outs:
        out.logits.square().mean().backward()
    torch.testing.assert_close(outs[1].logits, outs[0].logits, rtol=1e-4, atol=1e-4)
    theirs = dict(fused.named_parameters())
    for key, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(theirs[key].grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_compiled_it_breaks_at_its_lstms_alone() -> None:
    model, ids = made(SPECS["lstm-moe"]).eval(), token_ids()
    seen: list[torch.fx.GraphModule] = []

    def noting(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(graph)
        return graph

    with torch.no_grad():
        out = torch.compile(model, backend=noting)(ids)
        assert torch.equal(out.logits, model(ids).logits)
    assert 0 < len(seen) <= 2 * 2 + 1 + 2  # around each of two, and the layers that hold them
    torch._dynamo.reset()


def test_exported_it_is_for_one_length() -> None:
    model, ids = made(SPECS["lstm-moe"]).eval(), token_ids()
    with torch.no_grad():
        exported = torch.export.export(model, (ids,), strict=False).module()
        assert torch.equal(exported(ids).logits, model(ids).logits)


def test_it_learns_and_saves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = imported(SPECS["sampled"])
    model, ids = module.Model(), token_ids(4, 16)
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=3e-2), lr=3e-2)
    losses = []
    for _ in range(30):
        loss, _out = model.training_loss(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(model.eval().training_loss(ids)[0].item())
        model.train()
    assert losses[-1] < 0.6 * losses[0]
    model.save(tmp_path / "m.safetensors")
    again = module.Model.load(tmp_path / "m.safetensors").eval()
    assert torch.equal(again(ids).hidden, model.eval()(ids).hidden)


# Sampled softmax


def test_words_are_drawn_by_rank() -> None:
    torch.manual_seed(0)
    words, count = 50, 200_000
    drawn = log_uniform_words(count, words, torch.device("cpu"))
    share = torch.bincount(drawn, minlength=words) / count
    law = torch.tensor([math.log((k + 2) / (k + 1)) / math.log(words + 1) for k in range(words)])
    assert math.isclose(law.sum().item(), 1, rel_tol=1e-5)
    chi = ((share - law).square() / law).sum() * count
    assert chi < 100  # of 49 degrees of freedom; 1 in 10^5 would be more by chance
    chance = [1 - (1 - p) ** 7 for p in law.double().tolist()]
    torch.testing.assert_close(
        log_expected(torch.arange(words), 7, words).double(),
        torch.tensor(chance).double().log(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_sampled_loss_is_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    words, count = 30, 8
    hidden, table, bias = torch.randn(2, 4, 6), torch.randn(words, 6), torch.randn(words)
    labels = torch.tensor([[3, 1, 0, 7], [2, 2, -100, 29]])
    uniform = torch.tensor([0.0, 0.99, 0.3, 0.3, 0.5, 0.1, 0.7, 0.2], dtype=torch.float64)
    drawn = {math.floor(math.exp(u * math.log(words + 1))) - 1 for u in uniform.tolist()}
    assert len(drawn) < count
    monkeypatch.setattr(torch, "rand", lambda *_, **__: uniform)
    found = sampled_softmax_loss(hidden, table, bias, labels, count, True)

    def corrected(vector: Tensor, word: int) -> float:
        logit = float(vector.double() @ table[word].double() + bias[word].double())
        share = math.log((word + 2) / (word + 1)) / math.log(words + 1)
        return logit - math.log(1 - (1 - share) ** count)

    losses = []
    for row in range(2):
        for t in range(3):
            label = int(labels[row, t + 1])
            if label >= 0:
                among = {word: corrected(hidden[row, t], word) for word in drawn | {label}}
                total = math.log(sum(math.exp(value) for value in among.values()))
                losses.append(total - among[label])
    assert len(losses) == 5
    assert math.isclose(found.item(), sum(losses) / 5, rel_tol=1e-5)


def test_with_every_word_drawn_it_is_the_full_softmax() -> None:
    torch.manual_seed(0)
    hidden, table = torch.randn(2, 9, 6, requires_grad=True), torch.randn(12, 6)
    labels = torch.randint(12, (2, 9))
    losses = [sampled_softmax_loss(hidden, table, None, labels, 5000, t) for t in (True, False)]
    predicted = F.linear(hidden, table)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(predicted, labels[:, 1:].flatten())
    assert torch.equal(losses[1], expected)
    torch.testing.assert_close(losses[0], expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_few_words_teach_what_all_would() -> None:
    """Gradients of many samples add up to one that points where the full softmax's does."""
    torch.manual_seed(0)
    hidden, table = torch.randn(1, 7, 6), torch.randn(200, 6, requires_grad=True)
    labels = torch.randint(200, (1, 7))
    total = torch.zeros_like(table)
    for _ in range(200):
        loss = sampled_softmax_loss(hidden, table, None, labels, 40, True)
        total += torch.autograd.grad(loss, table)[0]
    full = sampled_softmax_loss(hidden, table, None, labels, 40, False)
    exact = torch.autograd.grad(full, table)[0]
    assert F.cosine_similarity(total.flatten(), exact.flatten(), dim=0) > 0.95


# The page


PAGE = (Path(__file__).parent.parent / "docs" / "models" / "recurrent.md").read_text("utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_pages_specs_are_planned(block: str) -> None:
    plan = moegen.plan(yaml.safe_load(block), batch=2, sequence=8)
    assert len(plan.spec.model.routed()) == 1
    assert len(BLOCKS) == 2
