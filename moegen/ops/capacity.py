"""How many rows an expert takes."""

from __future__ import annotations

import math
from typing import Literal

from moegen.ops.op import op

Rounding = Literal["floor", "ceil", "nearest"]


@op()
def expert_capacity(
    rows: int,
    experts: int,
    factor: float,
    rounding: Rounding = "floor",
    minimum: int = 0,
    multiple: int = 1,
) -> int:
    """Slots of each expert: factor * rows / experts, rounded, at least `minimum`.

    `rows` counts tokens or choices, as the convention says; the result is then raised to a
    `multiple`. A `nearest` half goes to the even neighbour.
    """
    exact = factor * rows / experts
    if rounding == "floor":
        slots = math.floor(exact)
    elif rounding == "ceil":
        slots = math.ceil(exact)
    else:
        slots = round(exact)
    slots = max(slots, minimum)
    return -(-slots // multiple) * multiple


@op()
def in_mode(training: bool, train: float, evaluation: float) -> float:
    """The value for the mode that the module is in."""
    return train if training else evaluation
