"""The family of models: the root of what a spec describes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch.nn.functional as F

from moegen.graph.layer import Layer
from moegen.spec.element import Kinds, Path
from moegen.spec.words import counted

if TYPE_CHECKING:
    from moegen.arch.moe import MoE
    from moegen.graph.component import Component

LONGEST = 4096  # tokens that a plan is for unless more are asked for


class RoutedLayer(NamedTuple):
    """A mixture of a model: its layer, what it is, and where the spec says that.

    stack: dotted name of the child that holds the layers, "" if that is the model itself.
    """

    layer: int
    moe: MoE
    path: Path
    stack: str = ""

    @property
    def site(self) -> str:
        """Dotted name of the layer's call site."""
        return f"{self.stack}.layers.{self.layer}".lstrip(".")


@dataclass(frozen=True)
class Side:
    """Units of a workload that are counted apart: what they are, and how many.

    child: whose work they are; "" for all that no other side has.
    """

    unit: str
    count: int
    child: str = ""


class Model(Kinds, Layer):
    """A whole network. `forward` takes what a user has and returns what training needs.

    The fields of what `forward` returns are an Output: first what the loss is computed from, and,
    where layers are routed, `losses` by name, weighted, and `routing`, a record of each layer.
    `loss` and what else there is are programs of their own: `step` and `new_cache` to decode.
    """

    default_kind: ClassVar[str | None] = "decoder"

    runtime: ClassVar[str] = ""  # the class that emitted models of this kind derive from
    unit: ClassVar[str] = "token"  # what FLOPs are counted for
    routed_unit: ClassVar[str] = ""  # what meets experts, so what parameters are active for
    whole: ClassVar[str] = "sequence"  # what tokens are of
    counted_by: ClassVar[tuple[str, int] | None] = None  # ids by which loads are told, how many
    records: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {}  # docs of its own records

    @property
    def tied(self) -> bool:
        """Whether the output head uses the embedding's table."""
        return False

    def class_name(self) -> str:
        """What users import."""
        return "Model"

    def warnings(self) -> Iterator[tuple[Path, str]]:
        """Yield (path, sentence) for what is allowed but seldom meant."""
        yield from ()

    def routed(self) -> list[RoutedLayer]:
        """Every routed layer, in the order of Output's routing."""
        return []

    def depth(self, stack: str) -> int:
        """How many layers a stack has, inserted ones counted."""
        raise TypeError(f"{type(self).__name__} has no stack {stack!r}")

    def decodes(self, stack: str) -> bool:
        """Whether tokens of a stack are decoded one after the other, as well as all at once."""
        return "step" in self.programs()

    def seen(self, stack: str, sequence: int) -> int:
        """Tokens of each sequence that a stack sees."""
        return sequence

    @property
    def active_for(self) -> str:
        """What active parameters are counted for."""
        return self.routed_unit or self.unit

    def attend(self, q: Any, k: Any, v: Any, context: Any, **options: Any) -> Any:
        """Attention [B, H, S, d] of a layer that sees all: whom a position sees is the model's."""
        return F.scaled_dot_product_attention(q, k, v, **options)

    # Workloads: a batch of inputs of some length

    def length(self, asked: int | None) -> int:
        """The length of one input that a plan is for: what was asked for, or what is usual."""
        return asked or LONGEST

    def units(self, batch: int, sequence: int) -> int:
        """How many `unit`s a workload has."""
        return batch * sequence

    def workload(self, batch: int, sequence: int) -> str:
        """A workload in words: `2 x 4,096 tokens`."""
        return f"{batch} x {counted(sequence, self.unit)}"

    def sides(self, batch: int, sequence: int) -> tuple[Side, ...]:
        """Sorts of units whose FLOPs are told apart, if there are any; the last has the rest."""
        return ()

    def by_task(self, root: Component) -> dict[str, int]:
        """Parameters that one unit uses for each task, of a model with several tasks."""
        return {}

    def caches(self, cache: Any, sequence: int) -> dict[str, tuple[Any, int]]:
        """The parts of a cache by name, and the positions that each is for; 0 if for any."""
        return {"cache": (cache, sequence)}

    def remarks(self) -> Iterator[str]:
        """What a reader of an estimate should know of the units, in sentences."""
        yield from ()

    def examples(self, batch: Any, sequence: Any, new: int = 1) -> dict[str, Any]:
        """Inputs of each program, in the order to run them, as functions of results so far."""
        raise TypeError(f"{type(self).__name__} takes no inputs")
