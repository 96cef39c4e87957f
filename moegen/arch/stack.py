"""Stacks: the blocks of a model in their order, made from the sections that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moegen.arch.block import Block, InsertedBlock
from moegen.arch.mixture_rules import SILENCE, leaks, of_ids
from moegen.arch.model import RoutedLayer
from moegen.arch.placement import Placement
from moegen.arch.routing.ids import TOKEN
from moegen.graph.builder import Builder
from moegen.ops.sequences import per_token
from moegen.spec.element import Path

if TYPE_CHECKING:
    from moegen.arch.attention import Attention


@dataclass(frozen=True)
class Stack:
    """So many blocks of a model that has `norm`, `ffn`, `moe` and `residual_scale` sections.

    attention: of every block; placement: where mixtures stand, and said_at where the spec says
    that; name: of the child that holds the blocks, if it is not the model itself; block: makes
    one from its parts.
    """

    model: Any
    layers: int
    attention: Attention
    placement: Placement | None
    said_at: Path = ("moe", "placement")
    name: str = ""
    block: Callable[..., Block] = Block

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What the parts need of the whole."""
        model = self.model
        for path, sentence in self.attention.check(model.d_model):
            yield ("attention", *path), sentence
        if self.attention.window:
            for path, sentence in self.attention.window.placement.outside(self.layers):
                yield ("attention", "window", "placement", *path), sentence
        if self.placement is None:
            if model.ffn is None:
                yield (), "a model needs ffn, moe, or both"
            return
        for path, sentence in self.placement.outside(self.layers):
            yield (*self.said_at, *path), sentence
        own = set(self.placement.of(self.layers))
        if model.ffn is None and len(own) < self.layers:
            dense = next(i for i in range(self.layers) if i not in own)
            yield self.said_at, f"layer {dense} is not routed, so the model needs ffn too"

    # Facts

    def routed(self) -> list[RoutedLayer]:
        """Every routed layer, inserted ones counted."""
        if self.placement is None:
            return []
        found = []
        for layer in self._routed_layers():
            moe, path = self.model.moe.in_layer(layer)
            found.append(RoutedLayer(layer, moe, path, self.name))
        return found

    def _routed_layers(self) -> tuple[int, ...]:
        assert self.placement is not None
        if not self.placement.insert:
            return self.placement.of(self.layers)
        stack = self._with_extra(list(range(self.layers)), [None] * self.placement.insert)
        return tuple(i for i, layer in enumerate(stack) if layer is None)

    def _with_extra(self, own: list[Any], extra: list[Any]) -> list[Any]:
        """The stack's own layers with the extra ones where the placement inserts them."""
        assert self.placement is not None
        for index, layer in zip(self.placement.inserted(self.layers), extra, strict=True):
            own.insert(index, layer)
        return own

    def blocks(self) -> list[Block | InsertedBlock]:
        """The stack, equal blocks being equal elements."""
        model = self.model
        routed = {one.layer: (one.moe, one.path) for one in self.routed()}
        inserts = self.placement is not None and self.placement.insert
        common = {
            "norm": model.norm,
            "routing": bool(routed),
            "residual_scale": model.residual_scale,
        }
        made: dict[Any, Block] = {}
        stack: list[Block | InsertedBlock] = []
        extra = []
        if inserts:
            shared = {"norm": model.norm, "residual_scale": model.residual_scale}
            extra = [
                InsertedBlock(moe=moe, moe_path=path, **shared) for moe, path in routed.values()
            ]
            routed = {}
        for layer in range(self.layers):
            moe, path = routed.get(layer, (None, ()))
            attention = self.attention.in_layer(layer, self.layers)
            key = (path, bool(attention.window), moe is None)
            if key not in made:
                ffn = None if moe else model.ffn
                made[key] = self.block(
                    attention=attention, ffn=ffn, moe=moe, moe_path=path, **common
                )
            stack.append(made[key])
        return self._with_extra(stack, extra) if inserts else stack


# What every model with routed layers needs


def given_ids(routed: list[RoutedLayer]) -> tuple[str, ...]:
    """Names of the ids that a user gives beside the tokens', each once."""
    names = [name for one in routed for name in one.moe.given()]
    return tuple(name for name in dict.fromkeys(names) if name != TOKEN)


def known_ids(
    b: Builder, routed: list[RoutedLayer], ids: Any, given: dict[str, Any]
) -> dict[str, Any]:
    """What routers read beside tokens, one for every token of ids [B, S]."""
    known = {}
    for name in dict.fromkeys(name for one in routed for name in one.moe.given()):
        if name == TOKEN:
            known[name] = ids.flatten()
        else:
            known[name] = b.name(per_token(given[name], ids.shape[0], ids.shape[1]), name)
    return known


def total_losses(b: Builder, moe: Any, routing: Any) -> dict[str, Any]:
    """Every auxiliary loss over all routed layers, weighted, ready to be added."""
    return {
        name: loss.over_layers(b, name, routing, moe) * loss.weight
        for name, loss in moe.losses.items()
    }


def broken_ids(routed: list[RoutedLayer], vocabulary: int) -> Iterator[tuple[Path, str]]:
    """Ids of routed layers that do not fit the vocabulary, each once."""
    yield from dict.fromkeys(
        ((*one.path[1:], *below), sentence)
        for one in routed
        for below, sentence in of_ids(one.moe, vocabulary)
    )


def unplaced_overrides(moe: Any, routed: list[RoutedLayer]) -> Iterator[tuple[Path, str]]:
    """Overrides of layers that are not routed."""
    layers = {one.layer for one in routed}
    for index, override in enumerate(moe.overrides):
        for place, layer in enumerate(override.layers):
            if layer not in layers:
                path = ("moe", "overrides", index, "layers", place)
                yield path, f"layer {layer} is not a routed layer"


def ahead(routed: list[RoutedLayer]) -> Iterator[tuple[Path, str]]:
    """Warnings: routing that looks ahead cannot be had when decoding."""
    told: set[str] = set()
    for one in routed:
        if one.moe.non_causal == "accept":
            continue
        for below, sentence in leaks(one.moe):
            if sentence not in told:
                told.add(sentence)
                yield (*one.path[1:], *below), f"{sentence}; {SILENCE}"
