"""Emitted models where routing, padding and batches are at their limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import BATCH, LENGTH, VOCABULARY, imported, made, planned, token_ids
from tiny_specs import ALL_LOSSES, SPECS, moe, spec
from torch import Tensor

from moegen.graph.execute import tensors
from moegen.ops.routing import top_k

NAMES = sorted(SPECS)
ROUTED = [n for n in NAMES if "moe" in SPECS[n]["model"]]
CHOOSING = [n for n in ROUTED if n != "expert-choice"]  # tokens choose experts
CAPPED = {"switch-like", "capacity-per-choice", "overrides", "fp64"}
DROPLESS = [n for n in CHOOSING if n not in CAPPED]

# Numbers of 16 bits round differently where the shapes of products differ, and dynamic rotary
# frequencies depend on the length of the sequence, padding included.
ROUNDED = {"bf16", "mixed"}
BY_LENGTH = {"long-ropes", "longrope"}


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, check_dtype=False)


def finite(value: Any) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors(value))


def trained(model: Any, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients of the whole training loss, all of them finite."""
    model.zero_grad()
    loss, output = model.training_loss(ids, mask)
    loss.backward()
    assert finite(loss)
    assert finite(output)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert finite(gradient), name
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def undecided(model: Any) -> Any:
    """With routers that score all experts alike, so that the first ones are chosen."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("router", "router_bias", "balance_bias")):
                tensor.zero_()
    return model


# Few tokens


@pytest.mark.parametrize("name", NAMES)
def test_two_tokens_are_enough_to_train(name: str) -> None:
    trained(made(name).train(), token_ids(1, 2))


@pytest.mark.parametrize("name", NAMES)
def test_one_token_has_logits_and_gradients(name: str) -> None:
    model = made(name).train()
    output = model(token_ids(1, 1))
    assert output.logits.shape == (1, 1, VOCABULARY)
    total = output.logits.float().square().mean() + sum(getattr(output, "losses", {}).values())
    total.backward()
    assert finite(output)
    assert finite([p.grad for p in model.parameters()])


# Frequencies that depend on the length need a last position.
EMPTY = [(n, 0, LENGTH) for n in NAMES] + [(n, 2, 0) for n in NAMES if n not in BY_LENGTH]


@pytest.mark.parametrize(("name", "batch", "length"), EMPTY)
def test_a_batch_of_no_tokens_passes_through(name: str, batch: int, length: int) -> None:
    model = made(name).train()
    output = model(torch.zeros(batch, length, dtype=torch.int64))
    assert output.logits.shape == (batch, length, VOCABULARY)
    (output.logits.float().sum() + sum(getattr(output, "losses", {}).values())).backward()
    assert finite(output)
    assert not any(bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("name", ROUTED)
def test_a_batch_of_padding_alone_has_no_losses_and_counts_nothing(name: str) -> None:
    model = made(name).eval()
    output = model(token_ids(), torch.zeros(BATCH, LENGTH, dtype=torch.bool))
    assert finite(output)
    for routing in output.routing:
        assert not routing.load.any()
        assert not routing.probability.any()
        assert routing.dropped == 0 or name in CAPPED  # nothing kept of nothing chosen
    for loss in output.losses.values():
        assert loss == 0


# Uneven routing


@pytest.mark.parametrize("name", CHOOSING)
def test_experts_without_tokens_get_gradients_of_exactly_zero(name: str) -> None:
    model = undecided(made(name)).train()
    ids = token_ids()
    output = model(ids)
    gradients = trained(model, ids)
    routed = [block.moe for block in model.layers if hasattr(block, "moe")]
    for layer, routing in zip(routed, output.routing, strict=True):
        idle = routing.load == 0
        assert idle.any()
        named = {f"{p.data_ptr()}": n for n, p in model.named_parameters()}
        for label in ("gate_up", "up", "down", "gate_up_bias", "up_bias", "down_bias"):
            parameter = getattr(layer, label, None)
            if parameter is not None:
                gradient = gradients[named[f"{parameter.data_ptr()}"]]
                assert not gradient[idle].any()
                assert gradient[~idle].any()


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_all_tokens_may_go_to_one_expert(capacity: float | None) -> None:
    source = spec(
        "single", {"moe": moe(router={"select": 1}, capacity=capacity, losses=ALL_LOSSES)}
    )
    model = undecided(made(source)).train()
    (first, _) = model(token_ids()).routing
    assert first.load.tolist() == [BATCH * LENGTH, *[0] * 7]
    kept = BATCH * LENGTH if capacity is None else BATCH * LENGTH // 8
    close(first.dropped, torch.tensor(1 - kept / (BATCH * LENGTH)))
    trained(model, token_ids())


def test_a_large_bias_draws_every_token_to_its_expert() -> None:
    model = made("deepseek-v3-like").eval()
    for block in model.layers[1:]:
        block.moe.balance_bias.zero_()[5] = 100.0
    for routing in model(token_ids()).routing:
        assert routing.load[5] == BATCH * LENGTH


# Capacity


class Spy:
    """Calls a function of an emitted model and remembers what went in and out."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls: list[tuple[tuple[Any, ...], Any]] = []

    def __call__(self, *args: Any, **options: Any) -> Any:
        out = self.function(*args, **options)
        self.calls.append((args, out))
        return out


def spied(monkeypatch: pytest.MonkeyPatch, source: Any, name: str) -> Spy:
    module = imported(source).model
    spy = Spy(getattr(module, name))
    monkeypatch.setattr(module, name, spy)
    return spy


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", sorted(CAPPED))
def test_no_expert_takes_more_than_its_slots_and_every_choice_is_kept_or_dropped(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(name).train(training)
    sorts = spied(monkeypatch, name, "sort_by_expert")
    slots = spied(monkeypatch, name, "expert_capacity")
    output = model(token_ids())
    capped = [one.moe for one in planned(name).spec.model.routed()]
    limits = iter(out for _, out in slots.calls)
    for layer, (_, (order, ends)), routing in zip(capped, sorts.calls, output.routing, strict=True):
        kept, chosen = int(ends[-1]), BATCH * LENGTH * layer.chosen
        rows = torch.diff(ends, prepend=ends.new_zeros(1))
        if layer.capacity:
            assert int(rows.max()) <= next(limits)
        assert int(routing.load.sum()) == chosen
        assert (rows <= routing.load).all()
        assert len(order) == chosen
        close(routing.dropped * chosen, torch.tensor(float(chosen - kept)))
    assert any(routing.dropped > 0 for routing in output.routing) or name == "switch-like"


def test_earlier_tokens_and_first_choices_come_first() -> None:
    source = spec("tight", {"moe": moe(router={"select": 1}, capacity=1.0), "layers": 1})
    model = undecided(made(source)).eval()
    rows: list[Tensor] = []
    model.layers[0].moe.register_forward_hook(lambda m, i, o: rows.append(o[0]))
    model(token_ids())
    touched = rows[0].flatten(0, 1).abs().sum(-1) > 0
    assert touched.tolist() == [True] * 3 + [False] * 21  # 24 tokens, 8 experts: 3 slots


def test_ample_capacity_is_no_capacity() -> None:
    plain, ample = spec("plain", {"moe": moe()}), spec("ample", {"moe": moe(capacity=64.0)})
    one, other = made(plain).train(), made(ample).train()
    other.load_state_dict(one.state_dict())
    a, b = one(token_ids()), other(token_ids())
    assert torch.equal(a.logits, b.logits)
    assert all(torch.equal(x.load, y.load) for x, y in zip(a.routing, b.routing, strict=True))
    assert not any(routing.dropped for routing in b.routing)
    ours, theirs = trained(one, token_ids()), trained(other, token_ids())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_evaluation_has_a_capacity_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = spied(monkeypatch, "switch-like", "expert_capacity")
    model = made("switch-like")
    model.train()(token_ids())
    model.eval()(token_ids())
    assert [out for _, out in slots.calls] == [7, 7, 12, 12]  # 24 tokens, 4 experts: 1.25 and 2


# Padding

LOSSES = {
    "dropless": moe(losses=ALL_LOSSES),
    "first choices": moe(losses={"balance": {"weight": 0.1, "count": "first"}}),
    "all choices": moe(losses={"balance": {"weight": 0.1, "count": "all"}}),
    "pooled": moe(losses={"balance": {"weight": 0.1, "reduction": "pooled"}}),
    "mean of layers": moe(losses={"z": {"weight": 0.1, "reduction": "mean"}}),
    "capacity": moe(losses=ALL_LOSSES, capacity={"factor": 1e-6, "minimum": 5}),
}


def padded(length: int = LENGTH, more: int = 4) -> tuple[Tensor, Tensor]:
    """Two sequences of `length` with padding of random tokens after them, and the mask."""
    ids = torch.cat((token_ids(length=length), token_ids(length=more, seed=7)), 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, length:] = False
    return ids, mask


def source_of(name: str) -> Any:
    return (
        spec(f"padded-{name.replace(' ', '-')}", {"moe": LOSSES[name]}) if name in LOSSES else name
    )


UNPADDED = [
    n for n in [*LOSSES, *NAMES] if n not in {*ROUNDED, *BY_LENGTH, *CAPPED, "expert-choice"}
]


@pytest.mark.parametrize("name", UNPADDED)
def test_padding_changes_neither_logits_nor_losses_nor_statistics(name: str) -> None:
    model = made(source_of(name)).eval()
    ids, mask = padded()
    alone, beside = model(token_ids()), model(ids, mask)
    close(beside.logits[:, :LENGTH], alone.logits)
    for one, other in zip(
        getattr(alone, "routing", ()), getattr(beside, "routing", ()), strict=True
    ):
        assert torch.equal(one.load, other.load)
        close(other.dropped, one.dropped)
        close(other.probability, one.probability)
        close(other.losses, one.losses)
    close(getattr(beside, "losses", {}), getattr(alone, "losses", {}))


@pytest.mark.parametrize("name", UNPADDED)
def test_padding_changes_no_gradient(name: str) -> None:
    model = made(source_of(name)).eval()
    ids, mask = padded()
    alone, beside = trained(model, token_ids()), trained(model, ids, mask)
    for key, gradient in alone.items():
        size = float(gradient.abs().max())  # sums of another order round at the size of their terms
        torch.testing.assert_close(beside[key], gradient, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("name", [n for n in [*LOSSES, *NAMES] if n not in ROUNDED])
def test_what_stands_in_padding_does_not_matter(name: str) -> None:
    """Not even where padding widens capacity, as it does where slots are counted by tokens."""
    model = made(source_of(name)).eval()
    ids, mask = padded()
    other = ids.masked_fill(~mask, 3)
    one, two = model(ids, mask), model(other, mask)
    close(one.logits[:, :LENGTH], two.logits[:, :LENGTH])
    for a, b in zip(getattr(one, "routing", ()), getattr(two, "routing", ()), strict=True):
        close(tuple(a), tuple(b))
    close(getattr(one, "losses", {}), getattr(two, "losses", {}))


def test_padding_takes_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    sorts = spied(monkeypatch, source_of("capacity"), "sort_by_expert")
    model = made(source_of("capacity")).eval()
    ids, mask = padded()
    model(token_ids())
    model(ids, mask)
    ends = [out[1] for _, out in sorts.calls]
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(ends[1], ends[3])


@pytest.mark.parametrize("name", [n for n in DROPLESS if n not in ROUNDED])
def test_sequences_of_uneven_length_are_as_they_are_alone(name: str) -> None:
    model = made(name).eval()
    ids, lengths = token_ids(), (12, 7)
    mask = torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(-1)
    together = model(ids, mask)
    alone = [model(ids[i : i + 1, :n]) for i, n in enumerate(lengths)]
    for i, n in enumerate(lengths):
        close(together.logits[i, :n], alone[i].logits[0])
    for layer, routing in enumerate(together.routing):
        apart = [out.routing[layer] for out in alone]
        assert torch.equal(routing.load, apart[0].load + apart[1].load)
        shares = [a.probability * n for a, n in zip(apart, lengths, strict=True)]
        close(routing.probability, (shares[0] + shares[1]) / sum(lengths))


def test_losses_of_uneven_sequences_are_means_over_what_they_are_of() -> None:
    source = source_of("dropless")
    model, lengths = made(source).eval(), (12, 7)
    ids = token_ids()
    mask = torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(-1)
    together = model(ids, mask)
    alone = [model(ids[i : i + 1, :n]) for i, n in enumerate(lengths)]
    for layer, routing in enumerate(together.routing):
        a, b = (out.routing[layer].losses for out in alone)
        close(
            routing.losses["sequence_balance"], (a["sequence_balance"] + b["sequence_balance"]) / 2
        )
        close(routing.losses["z"], (12 * a["z"] + 7 * b["z"]) / 19)
        expected = 8 * (routing.load / routing.load.sum() * routing.probability).sum()
        close(routing.losses["balance"], expected)


def test_a_sequence_of_padding_alone_is_no_sequence() -> None:
    model = made(source_of("dropless")).eval()
    ids = torch.cat((token_ids(), token_ids(1, seed=9)))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2] = False
    close(model(ids, mask).losses, model(token_ids()).losses)


def test_expert_choice_counts_real_tokens_alone() -> None:
    model = made("expert-choice").eval()
    ids, mask = padded(more=20)
    for routing in model(ids, mask).routing:
        real = BATCH * LENGTH
        assert int(routing.load.max()) <= real
        assert 0 <= float(routing.dropped) <= 1
        unchosen = float(routing.dropped) * real
        assert unchosen == pytest.approx(round(unchosen), abs=1e-4)
        close(routing.probability.sum(), torch.tensor(1.0))


# Identities


def test_one_expert_is_a_dense_network() -> None:
    dense = spec("dense", {"ffn": 16})
    single = spec(
        "single", {"moe": {"experts": {"count": 1, "width": 16}, "router": {"select": 1}}}
    )
    one, other = made(dense).eval(), made(single).eval()
    state = one.state_dict()
    for layer in range(2):
        network = {k: state.pop(f"layers.{layer}.ffn.{k}") for k in ("gate", "up", "down")}
        gate_up = torch.cat((network["gate"], network["up"]))
        state[f"layers.{layer}.moe.gate_up"] = gate_up.unsqueeze(0)
        state[f"layers.{layer}.moe.down"] = network["down"].unsqueeze(0)
        state[f"layers.{layer}.moe.router"] = torch.randn(1, 32)
    other.load_state_dict(state)
    close(other(token_ids()).logits, one(token_ids()).logits)


def experts_of(layer: Any, tokens: Tensor) -> Tensor:
    """Every expert's output for every token, [E, T, d], one by one."""
    outputs = []
    for gate_up, down in zip(layer.gate_up, layer.down, strict=True):
        gate, up = F.linear(tokens, gate_up).chunk(2, -1)
        outputs.append(F.linear(F.silu(gate) * up, down))
    return torch.stack(outputs)


@pytest.mark.parametrize("gate", ["none", "sum", "softmax_over_kept"])
def test_all_experts_chosen_are_a_weighted_sum(gate: str) -> None:
    source = spec("all", {"moe": moe(router={"select": 8, "gate": gate})})
    layer = made(source).eval().layers[0].moe
    x = torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(2))
    out, routing = layer(x, torch.ones(BATCH * LENGTH, dtype=torch.bool))
    tokens = x.flatten(0, 1)
    weights = F.linear(tokens, layer.router).softmax(-1)
    expected = torch.einsum("te,etd->td", weights, experts_of(layer, tokens))
    close(out.flatten(0, 1), expected)
    assert routing.load.tolist() == [BATCH * LENGTH] * 8


@pytest.mark.parametrize(
    "router",
    [
        {"select": 2},
        {"select": 2, "gate": "sum"},
        {"select": 3, "gate": "softmax_over_kept"},
        {"select": 2, "affinity": "sigmoid", "gate": {"normalize": "sum", "scale": 2.5}},
        {"select": 1, "gate": {"scale": 4.0}},
        {"select": 2, "balance_bias": 0.1, "affinity": "sigmoid"},
        {"select": 2, "restrict": {"groups": 4, "keep": 2, "by": "max"}},
    ],
    ids=str,
)
def test_a_token_gets_its_chosen_experts_by_weight(router: dict[str, Any]) -> None:
    layer = made(spec("one-by-one", {"moe": moe(router=router)})).eval().layers[0].moe
    x = torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(2))
    out, routing = layer(x, torch.ones(BATCH * LENGTH, dtype=torch.bool))
    tokens = x.flatten(0, 1)
    logits = F.linear(tokens, layer.router)
    scores = logits.sigmoid() if router.get("affinity") == "sigmoid" else logits.softmax(-1)
    ranked = scores + layer.balance_bias if "balance_bias" in router else scores
    everything = experts_of(layer, tokens)
    load = torch.zeros(8, dtype=torch.int64)
    for token in range(BATCH * LENGTH):
        rank = ranked[token].clone()
        if "restrict" in router:
            groups = rank.view(4, 2).amax(-1).argsort(descending=True)[2:]
            rank.view(4, 2)[groups] = float("-inf")
        chosen = rank.argsort(descending=True)[: router["select"]]
        load[chosen] += 1
        gate = router.get("gate", "none")
        kind = gate if isinstance(gate, str) else gate.get("normalize", "none")
        weights = scores[token, chosen]
        if kind == "sum":
            weights = weights / weights.sum()
        if kind == "softmax_over_kept":
            weights = logits[token, chosen].softmax(-1)
        weights = weights * (1.0 if isinstance(gate, str) else gate.get("scale", 1.0))
        close(out.flatten(0, 1)[token], weights @ everything[chosen, token])
    assert torch.equal(routing.load, load)


EXPERT_ROWS = (
    *("router", "router_bias", "balance_bias", "gate_up", "up", "down"),
    *("gate_up_bias", "up_bias", "down_bias"),
)


@pytest.mark.parametrize("name", [n for n in ROUTED if "restrict" not in str(SPECS[n])])
def test_the_order_of_experts_does_not_matter(name: str) -> None:
    one, other = made(name).eval(), made(name).eval()
    order = {}
    for layer, block in enumerate(other.layers):
        if not hasattr(block, "moe"):
            continue
        order[layer] = torch.randperm(len(block.moe.router))
        with torch.no_grad():
            for label in EXPERT_ROWS:
                rows = getattr(block.moe, label, None)
                if rows is not None:
                    rows.copy_(rows[order[layer]].clone())
    a, b = one(token_ids()), other(token_ids())
    tolerance = 1e-2 if name in ROUNDED else 1e-5
    torch.testing.assert_close(a.logits, b.logits, rtol=tolerance, atol=tolerance)
    for permutation, x, y in zip(order.values(), a.routing, b.routing, strict=True):
        assert torch.equal(x.load[permutation], y.load)
        close(x.probability[permutation], y.probability)


# A tied head shows the broken row to every position.
UNTIED = [n for n in DROPLESS if n not in ROUNDED and "tied" not in str(SPECS[n])]


@pytest.mark.parametrize("name", UNTIED)
def test_a_broken_token_breaks_no_other_sequence(name: str) -> None:
    model = made(name).eval()
    ids = token_ids()
    ids[0, 3] = 60
    ids[1] = ids[1].clamp(max=59)
    whole = model(ids).logits
    with torch.no_grad():
        model.embedding[60] = float("nan")
    broken = model(ids).logits
    assert broken[0, 3:].isnan().all()
    close(broken[1], whole[1])


# Statistics and balance


@pytest.mark.parametrize("name", CHOOSING)
def test_loads_count_the_choices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = spied(monkeypatch, name, "top_k")
    output = made(name).eval()(token_ids())
    grouped = "restrict" in str(SPECS[name])  # which asks top_k for groups first
    experts = [out for _, out in choices.calls][1 if grouped else 0 :: 2 if grouped else 1]
    for chosen, routing in zip(experts, output.routing, strict=True):
        expected = torch.bincount(chosen.flatten(), minlength=len(routing.load))
        assert torch.equal(routing.load, expected)


def told_apart(source: Any, words: int) -> Any:
    """A model whose first layer sends token i to expert i % words with certainty."""
    model = made(source).eval()
    with torch.no_grad():
        block = model.layers[0]
        block.attention.output.zero_()
        block.ffn_norm.fill_(1.0)
        model.embedding.zero_()
        block.moe.router.zero_()
        for word in range(VOCABULARY):
            model.embedding[word, word % words] = 1.0
        for expert in range(words):
            block.moe.router[expert, expert] = 20.0
    return model


BALANCED = spec(
    "balanced",
    {
        "layers": 1,
        "moe": moe(
            experts={"count": 4, "width": 16},
            router={"select": 1},
            losses={"balance": 1.0, "sequence_balance": 1.0},
        ),
    },
)


def test_balance_is_one_when_experts_share_alike() -> None:
    ids = torch.arange(LENGTH).repeat(BATCH, 1)
    output = told_apart(BALANCED, 4)(ids)
    assert output.routing[0].load.tolist() == [6, 6, 6, 6]
    close(output.losses["balance"], torch.tensor(1.0))
    close(output.losses["sequence_balance"], torch.tensor(1.0))


def test_balance_is_the_number_of_experts_when_one_does_all() -> None:
    ids = torch.full((BATCH, LENGTH), 2)
    output = told_apart(BALANCED, 4)(ids)
    assert output.routing[0].load.tolist() == [0, 0, 24, 0]
    close(output.losses["balance"], torch.tensor(4.0))
    close(output.losses["sequence_balance"], torch.tensor(4.0))


COUNTED = [
    (reduction, count, value)
    for reduction in ("sum", "mean", "pooled")
    for count, value in (("mean", 1.0), ("all", 2.0), ("first", 1.0))
    if (reduction, count) != ("pooled", "first")  # refused: pooled statistics are of all choices
]


@pytest.mark.parametrize(("reduction", "count", "value"), COUNTED)
def test_balanced_values_are_as_the_spec_counts(reduction: str, count: str, value: float) -> None:
    loss = {"weight": 0.5, "count": count, "reduction": reduction}
    source = spec("counted", {"moe": moe(losses={"balance": loss})})
    output = undecided(made(source)).eval()(token_ids())
    layers = 2 if reduction == "sum" else 1
    # Scores are all alike, so that the loss is the sum of what it counts.
    close(output.losses["balance"], torch.tensor(0.5 * value * layers))


@pytest.mark.parametrize("rate", [0.001, 0.5])
def test_the_balance_bias_moves_towards_even_loads(rate: float) -> None:
    source = spec("biased", {"moe": moe(router={"select": 2, "balance_bias": rate})})
    model = made(source).train()
    before = [block.moe.balance_bias.clone() for block in model.layers]
    output = model(token_ids())
    unchanged = [block.moe.balance_bias for block in model.layers]
    assert all(map(torch.equal, before, unchanged))
    model.update_balance(output.routing)
    for block, old, routing in zip(model.layers, before, output.routing, strict=True):
        mean = routing.load.float().mean()
        close(block.moe.balance_bias, old + rate * torch.sign(mean - routing.load))
        assert not block.moe.balance_bias.requires_grad


def test_the_balance_bias_evens_out_loads() -> None:
    source = spec("biased", {"moe": moe(router={"select": 2, "balance_bias": 0.01}), "layers": 1})
    model, ids = made(source).eval(), token_ids(8, 32)
    first = model(ids).routing[0].load
    for _ in range(60):
        model.update_balance(model(ids).routing)
    last = model(ids).routing[0].load
    assert last.float().std() < 0.5 * first.float().std()


def test_the_bias_changes_choices_but_no_weights() -> None:
    layer = made(spec("b", {"moe": moe(router={"select": 8, "balance_bias": 0.1})})).layers[0].moe
    x, valid = torch.randn(1, 5, 32), torch.ones(5, dtype=torch.bool)
    out, _ = layer(x, valid)
    layer.balance_bias.add_(torch.randn(8))
    close(layer(x, valid)[0], out)


# Training and evaluation


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_deterministic(name: str) -> None:
    model = made(name).eval()
    one, two = model(token_ids()), model(token_ids())
    assert all(map(torch.equal, tensors(one), tensors(two)))


def test_dropout_and_jitter_are_for_training_alone() -> None:
    model, ids = made("switch-like"), token_ids()
    evaluated = model.eval()(ids).logits

    def trained_with(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.train()(ids).logits  # type: ignore[no-any-return]

    assert torch.equal(trained_with(1), trained_with(1))
    assert not torch.equal(trained_with(1), trained_with(2))
    assert torch.equal(model.eval()(ids).logits, evaluated)


def test_jitter_alone_moves_the_router_and_not_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    source = spec(
        "jittered", {"moe": moe(router={"select": 8, "noise": {"kind": "jitter", "eps": 0.3}})}
    )
    jitters = spied(monkeypatch, source, "jitter")
    experts = spied(monkeypatch, source, "routed_feed_forward")
    made(source).train()(token_ids())
    (args, seen), (given, _) = jitters.calls[0], experts.calls[0]
    assert given[0] is args[0]
    factor = seen / args[0]
    assert not torch.equal(seen, args[0])
    assert factor.min() >= 0.7 - 1e-5
    assert factor.max() <= 1.3 + 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_layers_give_the_same_gradients(name: str) -> None:
    one, other = made(name).train(), made(name).train()
    other.checkpoint_layers(every=2 if name == "windowed" else 1)
    torch.manual_seed(5)
    ours = trained(one, token_ids())
    torch.manual_seed(5)
    theirs = trained(other, token_ids())
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        assert torch.equal(gradient, theirs[key]), key


# Parameters


@pytest.mark.parametrize(
    "name", ["deepseek-v3-like", "grok-like", "bf16", "longrope", "switch-like"]
)
def test_a_saved_model_is_loaded_as_it_was(name: str, tmp_path: Path) -> None:
    model = made(name).eval()
    model.save(tmp_path / "weights.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]
    again = imported(name).Model.load(tmp_path / "weights.safetensors").eval()
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key])
        assert value.dtype == theirs[key].dtype
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(again.named_buffers())[key]), key
    assert torch.equal(model(token_ids()).logits, again(token_ids()).logits)


def test_the_balance_bias_is_saved_and_tables_of_positions_are_not() -> None:
    keys = made("deepseek-v3-like").state_dict().keys()
    assert sum(key.endswith("balance_bias") for key in keys) == 3
    assert not any("frequencies" in key for key in keys)


def test_a_tied_head_is_saved_once(tmp_path: Path) -> None:
    model = made("grok-like")
    assert "embedding" in model.state_dict()
    assert "head" not in model.state_dict()


@pytest.mark.parametrize("change", ["missing", "more", "shape"])
def test_weights_of_another_model_are_refused(change: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = made("plain-moe").state_dict()
    if change == "missing":
        del state["layers.1.moe.router"]
    elif change == "more":
        state["layers.1.moe.extra"] = torch.zeros(1)
    else:
        state["layers.1.moe.router"] = torch.zeros(9, 32)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(RuntimeError, match=r"layers\.1\.moe"):
        imported("plain-moe").Model.load(tmp_path / "weights.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "weights.safetensors"
    model = made("dense")
    model.save(place)
    before = place.read_bytes()

    def fail(state: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        model.save(place)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]
    assert place.read_bytes() == before


WIDE = {"d_model": 128, "vocab_size": 512, "layers": 1, "ffn": None}


def started(**rest: Any) -> Any:
    large = moe(experts={"count": 8, "width": 128, "bias": True}, shared=1)
    torch.manual_seed(0)
    source = spec("started", {**WIDE, "moe": large, **rest.pop("model", {})}, **rest)
    return imported(source).Model().requires_grad_(False)


def test_parameters_start_normal_as_the_spec_says() -> None:
    init = {"std": 0.05, "embedding": {"std": 0.5}, "router": {"std": 0.2}}
    model = started(init=init, model={"norm": {"kind": "layer"}})
    layer = model.layers[0]
    for tensor, std in (
        (layer.moe.gate_up, 0.05),
        (layer.moe.down, 0.05),
        (layer.moe.shared.up, 0.05),
        (layer.attention.query, 0.05),
        (model.head, 0.05),
        (model.embedding, 0.5),
        (layer.moe.router, 0.2),
    ):
        assert float(tensor.std()) == pytest.approx(std, rel=0.08)
        assert abs(float(tensor.mean())) < 0.1 * std
    assert (layer.ffn_norm == 1).all()
    assert not layer.ffn_norm_bias.any()
    assert not layer.moe.gate_up_bias.any()
    assert not layer.moe.down_bias.any()
    assert (model.norm == 1).all()


def test_parameters_start_truncated_as_the_spec_says() -> None:
    layer = started(init={"kind": "truncated", "scale": 0.1}).layers[0]
    for tensor, fan_in in ((layer.moe.gate_up, 128), (layer.attention.query, 128)):
        sigma = (0.1 / fan_in) ** 0.5
        assert float(tensor.abs().max()) <= 2 * sigma
        assert float(tensor.abs().max()) > 1.9 * sigma
        assert float(tensor.std()) == pytest.approx(0.8796 * sigma, rel=0.05)  # cut at 2 sigma


def test_layers_start_differently_and_seeds_repeat() -> None:
    torch.manual_seed(4)
    one = imported("plain-moe").Model()
    torch.manual_seed(4)
    two = imported("plain-moe").Model()
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert not torch.equal(one.layers[0].moe.gate_up, one.layers[1].moe.gate_up)


# Generation

GREEDY = [n for n in NAMES if n not in {*ROUNDED, *BY_LENGTH, *CAPPED, "expert-choice"}]


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_generation_takes_the_likeliest_token_of_the_forward_pass(name: str) -> None:
    model, prompt = made(name).eval(), token_ids(BATCH, 4)
    out = model.generate(prompt, 5)
    assert torch.equal(out[:, :4], prompt)
    logits = model(out[:, :-1]).logits[:, 3:]
    assert torch.equal(logits.argmax(-1), out[:, 4:])


def test_sampling_from_the_likeliest_alone_is_greedy() -> None:
    model, prompt = made("plain-moe").eval(), token_ids(BATCH, 4)
    greedy = model.generate(prompt, 5)
    assert torch.equal(model.generate(prompt, 5, temperature=1.0, top_k=1), greedy)
    stream = list(model.stream(prompt, 5))
    assert torch.equal(torch.stack(stream, 1), greedy[:, 4:])


def test_ties_go_to_the_expert_of_the_lowest_index() -> None:
    scores = torch.tensor([[0.5, 0.7, 0.7, 0.7], [0.0, -0.0, 0.0, 0.0]])
    assert top_k(scores, 2).tolist() == [[1, 2], [0, 1]]
