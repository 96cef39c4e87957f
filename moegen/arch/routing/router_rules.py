"""What the parts of a router make of each other: compositions that would have no use, or none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moegen.spec.element import Path

if TYPE_CHECKING:
    from moegen.arch.routing.router import Router


def of_parts(router: Router) -> Iterator[tuple[Path, str]]:
    """Rules that need two parts of one router."""
    yield from _of_tables(router)
    yield from _of_even_loads(router)
    yield from _of_inputs(router)
    yield from _of_gates(router)
    noise = router.noise
    if noise and noise.kind == "learned" and noise.selection_only:
        yield (
            ("noise", "selection_only"),
            "learned noise learns through the gates, so they must see it",
        )


def _of_tables(router: Router) -> Iterator[tuple[Path, str]]:
    score = router.score
    if score.learned:
        return
    if router.input.kind != "token":
        yield ("input",), f"a {score.kind} looks at the token's id, so input has no use"
    if router.restrict:
        yield ("restrict",), f"a {score.kind} leaves nothing to choose, so restrict has no use"


def _of_even_loads(router: Router) -> Iterator[tuple[Path, str]]:
    """Selections that take all there is, or share it out evenly."""
    select, noise = router.select, router.noise
    if not (select.even_loads and select.tokens_choose):
        return
    if router.balance_bias:
        yield ("balance_bias",), f"loads under {select.kind} are equal, so balance_bias has no use"
    if router.restrict:
        yield ("restrict",), f"{select.kind} needs every expert for every token; remove restrict"
    if noise and noise.selection_only and select.kind == "all":
        yield ("noise",), "all selects nothing, so noise for selection only has no use"


def _of_inputs(router: Router) -> Iterator[tuple[Path, str]]:
    """Tokens that look alike cannot be told apart by experts that choose."""
    if router.input.kind == "sentence" and not router.select.tokens_choose:
        kind = router.select.kind
        yield ("input",), f"a sentence's tokens are scored alike, so {kind} cannot tell them apart"


def _of_gates(router: Router) -> Iterator[tuple[Path, str]]:
    second = getattr(router.select, "second", None)
    if second is None:
        return
    policies = {second.policy, second.eval_policy} & {"threshold", "random"}
    if policies and router.gate.normalize == "constant":
        policy = sorted(policies)[0]
        at = "policy" if second.policy == policy else "eval_policy"
        yield (
            ("select", "second", at),
            f"constant gates are 1, so {policy} skips nothing; use another normalize",
        )
