"""How many rows an expert takes."""

from __future__ import annotations

import math
from typing import Literal, TypeVar

from moegen.ops.op import op

Rounding = Literal["floor", "ceil", "nearest"]
First = Literal["nothing", "share_down", "share_up", "tokens_up"]
Number = TypeVar("Number", int, float)


def _rounded(exact: float, rounding: Rounding) -> int:
    """A whole number; of `nearest`, a half goes to the even neighbour."""
    if rounding == "floor":
        return math.floor(exact)
    return math.ceil(exact) if rounding == "ceil" else round(exact)


@op()
def expert_capacity(
    rows: int,
    experts: int,
    factor: float,
    rounding: Rounding = "floor",
    round_first: First = "nothing",
    times_first: int = 1,
    times: int = 1,
    maximum: int | None = None,
    minimum: int = 0,
    multiple: int = 1,
    multiple_above: int = 0,
) -> int:
    """Slots of each expert: factor * rows / experts, rounded, between maximum and minimum.

    `rows` counts tokens or choices, as the convention says; round_first rounds rows / experts, or
    factor * rows (then `times_first`), before the rest. What is rounded is taken `times`, bounded,
    and raised to a `multiple` if it is above `multiple_above`.
    """
    if round_first == "share_down":
        exact = factor * (rows // experts)
    elif round_first == "share_up":
        exact = factor * ((rows + experts - 1) // experts)
    elif round_first == "tokens_up":
        exact = math.ceil(factor * rows) * times_first / experts
    else:
        exact = factor * rows / experts
    slots = _rounded(exact, rounding) * times
    if maximum is not None:
        slots = min(slots, maximum)
    slots = max(slots, minimum)
    return -(-slots // multiple) * multiple if slots > multiple_above else slots


@op()
def share_of_tokens(tokens: int, share: float) -> int:
    """A share of all tokens, rounded up: fairseq's capacity in evaluation."""
    return math.ceil(share * tokens)


@op()
def in_mode(training: bool, train: Number, evaluation: Number) -> Number:
    """The value for the mode that the module is in."""
    return train if training else evaluation
