"""What routing hands on: to the losses, and to dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scored:
    """Every token against every expert, before anything is chosen.

    tokens [T, d]; logits and scores [T, E] in the router's precision; valid [T] tells real
    tokens from padding, None where a program has no padding (decoding).
    """

    tokens: Any
    logits: Any
    scores: Any
    valid: Any
    sequences: tuple[Any, Any]


@dataclass(frozen=True)
class Routed:
    """Who computes what: rows grouped by expert, and the way back to tokens.

    rows: makes the rows [N, d] of the experts from tokens [T, d]; ends: int32 [E], where each
    expert's rows end; restore: makes the outputs [T, d] from the experts' outputs [N, d];
    choices: experts [T, k] in order of preference before capacity, None if experts choose;
    load: int64 [E], choices of real tokens for each expert before capacity; dropped: the
    fraction of them that capacity refused. load and dropped are None outside `forward`.
    """

    rows: Callable[[Any], Any]
    ends: Any
    restore: Callable[[Any], Any]
    choices: Any
    load: Any
    dropped: Any
