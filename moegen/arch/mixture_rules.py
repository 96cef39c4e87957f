"""What the parts of a mixture need of each other, where no part knows it alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moegen.arch.routing.ids import TOKEN
from moegen.spec.element import Element, Path
from moegen.spec.words import nearest

if TYPE_CHECKING:
    from moegen.arch.moe import MoE


def of_mixture(moe: MoE) -> Iterator[tuple[Path, str]]:
    """All of them."""
    for rules in (of_capacity, of_experts, of_choices, of_weights, of_groups, of_ids):
        yield from rules(moe)


def of_capacity(moe: MoE) -> Iterator[tuple[Path, str]]:
    """Capacity and groups, where selection knows them."""
    select = moe.router.select
    kind = "run" if isinstance(moe.group, int) else moe.group
    if moe.group_kind not in select.takes_groups and "group" in moe.model_fields_set:
        known = " or ".join(select.takes_groups)
        yield ("group",), f"under {select.kind} tokens compete by {known}, not by {kind}"
    second = getattr(select, "second", None)
    if moe.capacity is None:
        if second is not None and second.takes_slot:
            path = ("router", "select", "second", "takes_slot")
            yield path, "there is no capacity, so nothing takes up a slot"
        if moe.router.gate.after_drop and not (second is not None and second.skips):
            yield ("router", "gate", "after_drop"), "there is no capacity, so nothing is dropped"
        return
    if not select.takes_capacity:
        verb = "fills every expert equally" if select.kind != "all" else "uses every expert"
        yield ("capacity",), f"{select.kind} {verb} and has no capacity"
        return
    skips = second is not None and second.skips
    for below, sentence in moe.capacity.check(moe.num_experts, moe.chosen, skips):
        yield ("capacity", *below), sentence
    if moe.experts.free and (moe.capacity.overflow != "drop" or moe.capacity.devices):
        yield ("capacity",), "experts without parameters are for overflow: drop, by expert"
    if isinstance(moe.group, int) and not moe.capacity.slots_of(moe.group, moe):
        those = f"{moe.group} tokens and {moe.num_experts} experts"
        yield ("capacity",), f"{those} give 0 slots; say minimum: 1 or rounding: ceil"


def of_experts(moe: MoE) -> Iterator[tuple[Path, str]]:
    """What some experts do not go with."""
    experts, select = moe.experts, moe.router.select
    if experts.free and select.even_loads:
        yield ("experts",), f"experts without parameters are for top_k, not {select.kind}"
    if experts.free and moe.router.gate.blend:
        yield ("experts",), "with blend the token itself is added already"
    if experts.nested is None:
        return
    if moe.router.gate.scales == "input" or experts.nested.router.gate.scales == "input":
        inside = () if moe.router.gate.scales == "input" else ("experts", "nested")
        at = (*inside, "router", "gate", "scales")
        yield at, "weights of mixtures inside experts are multiplied, so they scale outputs"
    if moe.router.balance_bias:
        yield ("router", "balance_bias"), "balance_bias knows no mixtures inside experts"
    if moe.granularity > 1:
        yield ("granularity",), "granularity is for experts that are networks, not mixtures"
    if not select.tokens_choose:
        yield ("experts", "nested"), f"mixtures inside experts are not for {select.kind}"
    if experts.free:
        yield ("experts", "nested"), "experts without parameters hold no mixtures"


def of_choices(moe: MoE) -> Iterator[tuple[Path, str]]:
    """What follows from how many experts a token takes, granularity applied."""
    select, score, capacity = moe.router.select, moe.router.score, moe.capacity
    m, k = moe.granularity, moe.chosen
    choices, leaves = select.logits(moe.num_choices), getattr(score, "leaves", None)
    if leaves not in (None, choices):
        sentence = f"the tree has {leaves} leaves for {choices} experts"
        yield ("router", "score", "branches"), sentence
    if m > 1 and select.tokens_choose and not score.learned:
        yield ("granularity",), f"a {score.kind} names one expert a token; use granularity 1"
    second = getattr(select, "second", None)
    if m > 1 and second is not None and second.draws:
        sentence = f"sampling draws one second expert, but granularity makes k {k}"
        yield ("router", "select", "second"), sentence
    if capacity and capacity.overflow == "next":
        if not score.learned:
            sentence = f"a {score.kind} names one expert a token, so there is no next one"
            yield ("capacity", "overflow"), sentence
        tries = min(capacity.passes, moe.num_experts)
        restrict = moe.router.restrict
        if restrict and list(restrict.check(moe.num_choices, tries)):
            at = ("capacity", "passes" if "passes" in capacity.model_fields_set else "overflow")
            sentence = (
                f"restrict {restrict.kind} lets a token choose from fewer than the {tries} that it"
            )
            yield at, f"{sentence} tries; set passes lower, or remove restrict"


def of_weights(moe: MoE) -> Iterator[tuple[Path, str]]:
    """What the sum of a token's weights leaves to the token itself, and to priorities."""
    gate, capacity, k = moe.router.gate, moe.capacity, moe.chosen
    if not moe.router.select.tokens_choose:
        return
    kept = gate.normalize == "softmax_over_kept"
    shares = kept or (gate.normalize == "sum" and gate.power == 1.0)
    constant = gate.normalize == "constant"
    if gate.blend:
        bounded = moe.router.affinity.sums_to_one or k == 1
        at_most_one = shares or (constant and k == 1) or (gate.normalize == "none" and bounded)
        second = getattr(moe.router.select, "second", None)
        refused = capacity or (second is not None and second.skips)
        path = ("router", "gate", "blend")
        if not at_most_one or gate.scale > 1:
            yield path, "weights can sum to more than 1, which leaves less than nothing to blend"
        elif (shares or constant) and gate.scale == 1 and not refused:
            yield path, "weights sum to 1, which leaves nothing to blend"
    if capacity is None:
        return
    known = constant or (shares and not gate.after_drop) or not moe.router.score.learned
    same = {"confidence_sum": known, "weight": constant or (known and k == 1)}
    same["confidence"] = not moe.router.score.learned
    what = {"confidence_sum": "sums of weights", "weight": "weights", "confidence": "best scores"}
    if same.get(capacity.priority):
        sentence = f"{what[capacity.priority]} are the same for all tokens, so priority"
        yield ("capacity", "priority"), f"{sentence} {capacity.priority} has no say; use rank"


def of_groups(moe: MoE) -> Iterator[tuple[Path, str]]:
    """Something must compete in a group."""
    select = moe.router.select
    if moe.group == "batch" or moe.capacity or not select.tokens_choose:
        return
    if moe.group_kind in select.takes_groups and not any(x.by_group for x in moe.losses.values()):
        yield ("group",), "nothing goes by group: there is no capacity and no loss that does"


def of_ids(moe: MoE, vocabulary: int | None = None) -> Iterator[tuple[Path, str]]:
    """Ids of one name are of one number; those of tokens as many as there are, once known."""
    known = {TOKEN: (vocabulary, "the vocabulary")} if vocabulary else {}
    router = moe.router
    parts = [(("router", name), getattr(router, name)) for name in ("input", "gates", "restrict")]
    parts += [(("losses", name), loss) for name, loss in moe.losses.items()]
    for path, part in parts:
        name = getattr(part, "id", None)
        if name is None or (vocabulary and name != TOKEN):
            continue
        own = "experts" if path[-1] == "restrict" else "count"
        count = getattr(part, own, None)
        count = len(count) if isinstance(count, tuple) else count
        if count is not None:
            there, place = known.setdefault(name, (count, ".".join(path)))
            if count != there:
                yield (*path, own), f"there are {count} of id {name} here but {there} in {place}"
        of = getattr(part, "of", None)
        if count is None and isinstance(of, int) and name in known and of >= known[name][0]:
            there, place = known[name]
            yield (*path, "of"), f"of is {of} but {place} has {there} of id {name}, from 0 on"


SILENCE = "moe.non_causal: accept says that this is meant"


def leaks(moe: MoE) -> Iterator[tuple[Path, str]]:
    """What makes a token's routing depend on later ones, which decoding does not have yet."""
    router, capacity = moe.router, moe.capacity
    select = router.select
    otherwise = "so losses are too low, and step() routes otherwise"
    if not select.causal:
        what = {
            "balanced": "balanced assigns all tokens of a batch at once in training",
            "soft": "soft mixes all tokens of a sequence, later ones too",
        }.get(select.kind, f"{select.kind} looks at later tokens, which decoding does not have yet")
        yield ("router", "select"), f"{what}, {otherwise}"
    if not router.input.causal:
        what = f"router input {router.input.kind} is a mean over later tokens too"
        yield ("router", "input"), f"{what}, {otherwise}"
    leak = capacity.leak(moe.chosen) if capacity else None
    if capacity and leak:
        at = "overflow" if capacity.priority == "rank" else "priority"
        at = at if at in capacity.model_fields_set else ""
        yield ("capacity", *([at] if at else [])), f"{leak}, {otherwise}"


def unknown_key(moe: MoE, place: Path) -> str | None:
    """What to say of a key in an override that no element has, with the nearest that it has."""
    element: Any = moe
    for step in place[:-1]:
        element = getattr(element, str(step), element)
    fields = list(type(element).model_fields)
    key = str(place[-1]) if place else ""
    if not isinstance(element, Element) or key in fields:
        return None
    best = nearest(key, fields)
    return f"no key {key!r} here" + (f"; did you mean {best!r}?" if best else "")
