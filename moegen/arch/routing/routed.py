"""What the parts of a router hand on: to each other, to the losses, to dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moegen.spec.element import Path

if TYPE_CHECKING:
    from moegen.arch.capacity import Capacity
    from moegen.arch.routing.router import Router
    from moegen.graph.builder import Builder


class Mixture(Protocol):
    """What selection needs to know of the layer that it works for."""

    @property
    def router(self) -> Router: ...  # noqa: D102
    @property
    def capacity(self) -> Capacity | None: ...  # noqa: D102
    @property
    def granularity(self) -> int: ...  # noqa: D102
    @property
    def num_experts(self) -> int: ...  # noqa: D102
    @property
    def num_choices(self) -> int: ...  # noqa: D102
    @property
    def num_identity(self) -> int: ...  # noqa: D102
    @property
    def total_experts(self) -> int: ...  # noqa: D102
    @property
    def at(self) -> Path: ...  # noqa: D102


class Linear(Protocol):
    """Tokens [T, d] times parameters of a name, with a bias or none, in the router's format."""

    def __call__(self, b: Builder, x: Any, name: str, n: int, bias: bool = False) -> Any:
        """Return [T, n]."""


@dataclass(frozen=True)
class Site:
    """Where a router stands: the tokens it is given, and what is known of them.

    choices: experts to choose from, free ones included; valid [T] tells real tokens from padding,
    None where a program has no padding (decoding); sequences: batch and length, T their product;
    ids: by name, [T] each; group: tokens that compete with each other, None for all of them;
    linear: one matrix for all tokens, or one for each expert or task; spread: from a token's
    choices to those of the whole layer, for routers inside experts.
    """

    choices: int
    valid: Any
    sequences: tuple[Any, Any]
    ids: Mapping[str, Any]
    group: Any
    linear: Linear
    spread: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Scored:
    """Every token against every expert, before anything is chosen.

    tokens [T, d]; all else [T, E] in the router's precision. clean: logits without noise; logits:
    as gates see them; scores: the affinity of these; ranked: what selection goes by, biased and
    minus infinity where forbidden; deviation: of the noise on logits, None if there is none;
    sure: whether the best of what is chosen cannot have a score near zero.
    """

    tokens: Any
    clean: Any
    logits: Any
    scores: Any
    ranked: Any
    deviation: Any
    site: Site
    sure: bool = False

    @property
    def valid(self) -> Any:
        """Which tokens are real, [T] or None."""
        return self.site.valid


@dataclass(frozen=True)
class Routed:
    """Who computes what: rows grouped by expert, and the way back to tokens.

    rows: makes the rows [N, d] of the experts from tokens [T, d]; ends: int32 [E], where each
    expert's rows end; restore: makes the outputs [T, d] from the experts' outputs [N, d].

    Where tokens choose: choices [T, k], in order of preference, before anything is refused; kept
    [T, k], after that, and after it `num_choices` for what is refused; weights [T, k] of choices;
    else None. through [T]: with what weight a token itself is added to the output, or None.
    row_weights [N]: the weight of each row.

    load: int64 [E], choices of real tokens for each expert before capacity; dropped: the fraction
    of them that capacity refused. load and dropped are None outside `forward`.
    """

    rows: Callable[[Any], Any]
    ends: Any
    restore: Callable[[Any], Any]
    load: Any
    dropped: Any
    choices: Any = None
    kept: Any = None
    weights: Any = None
    through: Any = None
    row_weights: Any = None
    row_valid: Any = None
