"""Tells of a spec's routing: what happens to a token in each distinct routed layer, in words."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from moegen.api import Overrides, Source, load
from moegen.arch.account import Account, accounts
from moegen.arch.spec import Spec
from moegen.emit.words import ranges
from moegen.report.screen import heading, note, plain, table


def routing_facts(source: Source, overrides: Overrides, batch: int, sequence: int | None) -> Any:
    """The facts of every routed layer, as `show --routing --json` prints them."""
    spec, length = _loaded(source, overrides, sequence)
    return {
        "name": spec.name,
        "batch": batch,
        "sequence": length,
        "layers": [_facts(one) for one in accounts(spec, batch, length)],
    }


def print_routing(
    screen: Console, source: Source, overrides: Overrides, batch: int, sequence: int | None
) -> None:
    """A table for each distinct routed layer, with a row for each part."""
    spec, length = _loaded(source, overrides, sequence)
    found = accounts(spec, batch, length)
    size = spec.model.workload(batch, length)
    if not found:
        screen.print(plain(f"{spec.name} has no routed layers"))
        return
    note(screen, plain(f"{spec.name}, numbers for a batch of {size}"))
    for one in found:
        heading(screen, plain(f"{_where(one, spec.model.depth(one.stack))}: {one.title}"))
        rows = table(None, ("part", "what happens"))
        rows.show_header = False
        for said in one.parts:
            rows.add_row(plain(said.part.removeprefix("router.")), plain(" ".join(said.sentences)))
        screen.print(rows)


def _where(account: Account, depth: int) -> str:
    layers = list(account.layers)
    stack = f"{account.stack} " if account.stack else ""
    return f"{stack}layer{'s' if len(layers) > 1 else ''} {ranges(layers)} of {depth}"


def _loaded(source: Source, overrides: Overrides, sequence: int | None) -> tuple[Spec, int]:
    spec = load(source, overrides).spec
    return spec, spec.model.length(sequence)


def _facts(account: Account) -> dict[str, Any]:
    parts = [
        {"part": said.part, "kind": said.kind, "sentences": list(said.sentences)}
        for said in account.parts
    ]
    facts = {"layers": list(account.layers), "title": account.title, "parts": parts}
    return {"stack": account.stack, **facts} if account.stack else facts
