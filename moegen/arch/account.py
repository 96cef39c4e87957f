"""Accounts: what happens to a token in each routed layer of a spec, as the layer's parts say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moegen.arch.mixture_rules import leaks
from moegen.arch.moe import MoE
from moegen.arch.setting import Setting
from moegen.arch.spec import Spec
from moegen.graph.builder import Trace
from moegen.spec.element import Element

# The sections of a MoE in a token's order; the router's parts are in theirs.
ORDER = ("router", "capacity", "experts", "shared", "residual", "extra", "losses")


@dataclass(frozen=True)
class Said:
    """What one part of a layer says: its section below `moe`, its kind if it is of a family."""

    part: str
    kind: str | None
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Account:
    """Layers that route alike, what they are, and what their parts say in a token's order."""

    layers: tuple[int, ...]
    title: str
    parts: tuple[Said, ...]
    stack: str = ""  # the child that holds them, if it is not the model itself


def accounts(spec: Spec, batch: int, sequence: int) -> list[Account]:
    """An account of every distinct routed layer, with the numbers of a batch of sequences."""
    alike: dict[tuple[str, str, tuple[Said, ...]], list[int]] = {}
    used = _parameters(spec)
    for one in spec.model.routed():
        last = Said("parameters", None, (_used(one.moe, *used[one.site]),))
        seen = spec.model.seen(one.stack, sequence)
        said = account_of(Setting(spec, one.moe, batch, seen), spec.model.decodes(one.stack))
        parts = (*said, last)
        alike.setdefault((one.stack, one.moe.describe(spec), parts), []).append(one.layer)
    return [
        Account(tuple(layers), title, parts, stack)
        for (stack, title, parts), layers in alike.items()
    ]


def account_of(setting: Setting, decodes: bool) -> Iterator[Said]:
    """What the parts of one layer say, in a token's order."""
    for name, part in (*_parts(setting.moe), ("masking", setting.spec.train.masking)):
        said = tuple(part.says(setting)) if part else ()
        if said:
            yield Said(name, getattr(part, "kind", None), said)
    if decodes:
        yield Said("decoding", None, tuple(_decoding(setting.moe)))
        yield Said("causality", None, tuple(_causality(setting.moe)))


def _parts(moe: MoE) -> Iterator[tuple[str, Element]]:
    for section in ORDER:
        part = getattr(moe, section)
        if section == "router":
            yield from ((f"router.{name}", one) for name, one in part.parts())
        elif section == "losses":
            yield from ((f"losses.{name}", one) for name, one in part.items())
        elif section == "capacity" and part is None:
            yield section, moe
        elif part is not None:
            yield section, part
            if section == "experts" and part.nested:
                yield "experts.nested", part.nested


def _decoding(moe: MoE) -> Iterator[str]:
    """How `step` differs from `forward`, as far as parts are left out of it."""
    nested = moe.experts.nested
    without = ["noise"] if moe.router.noise or (nested and nested.router.noise) else []
    without += ["capacity"] if moe.capacity else []
    if without:
        yield f"Decoding has no {' and no '.join(without)}."
    causal = moe.router.select.causal and moe.router.input.causal
    if not causal and moe.router.select.kind != "balanced":
        yield "Decoding routes the new tokens of a step among themselves."
    elif not without:
        yield "Decoding routes as evaluation does."


def _causality(moe: MoE) -> Iterator[str]:
    """Whether later tokens have a say in what becomes of a token."""
    found = [sentence for _, sentence in leaks(moe)]
    for sentence in found:
        yield f"Not causal: {sentence}."
    if not found:
        yield "Causal: what becomes of a token does not depend on later ones."


def _parameters(spec: Spec) -> dict[str, tuple[int, int]]:
    """By call site of a layer, parameters of its routed branch and how many a token uses."""
    root = Trace(spec).root()
    found: dict[str, tuple[int, int]] = {}
    for name, component in root.walk():
        site, _, part = name.rpartition(".")
        if part in ("moe", "extra"):
            total, active = found.get(site, (0, 0))
            for count, used, _ in component.totals().values():
                total, active = total + count, active + used
            found[site] = (total, active)
    return found


def _used(moe: MoE, total: int, active: int) -> str:
    varies = moe.experts.free or not moe.router.select.tokens_choose
    average = " on average" if varies and active < total else ""
    many = "all" if active == total else f"{active:,}"
    return f"A token uses {many} of the layer's {total:,} parameters{average}."
