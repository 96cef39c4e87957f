"""The facts a node carries: names of the keys in `node.meta`, and typed ways to read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from moegen.spec.element import Path

VAL = "val"  # FakeTensor, or a structure of them: fx's own convention
NAME = "name"  # the author's variable, or absent
PART = "part"  # this node is one target of its author's unpacking
SECTION = "section"  # the comment above a group of statements
ORIGIN = "origin"  # where it comes from
COST = "cost"  # what it costs
FUSED = "fused"  # what a node that fuses several replaces, a word for each
INSIDE = "inside"  # in place of the op's own, where a backend computes it otherwise
METHOD = "method"  # call_module only: which program of the child is called


@dataclass(frozen=True)
class Origin:
    """Where a node comes from: a place in the spec and a line of an element's source."""

    path: Path
    traced_at: str


def name(node: fx.Node) -> str | None:
    """The variable its author assigned the node to, or None."""
    return node.meta.get(NAME)


def section(node: fx.Node) -> str | None:
    """The section in which the node was traced, or None."""
    return node.meta.get(SECTION)


def fused(node: fx.Node) -> tuple[str, ...]:
    """What a node replaces, a word for each, in their order; nothing if it is no fusion."""
    return node.meta.get(FUSED, ())  # type: ignore[no-any-return]


def origin(node: fx.Node) -> Origin:
    """The place in the spec and in the elements' source that made the node."""
    return node.meta[ORIGIN]  # type: ignore[no-any-return]


def val(node: fx.Node) -> Any:
    """The node's value as fake tensors, after the shapes pass."""
    return node.meta[VAL]


def method(node: fx.Node) -> str:
    """The program of the child that a call_module node calls."""
    return node.meta.get(METHOD, "forward")  # type: ignore[no-any-return]
