"""Parameters counted by role, and the three conventions for how many of them are active."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from moegen.graph.component import Component


@dataclass(frozen=True)
class Share:
    """Parameters of one role: how many, how many of them a token uses, and their size in memory.

    trained: how many of them the spec's phase of training moves.
    """

    count: int
    active: int
    bytes: int
    trained: int


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, exactly; buffers are apart.

    Publishers mean one of three things by active parameters: all that a token uses, all but the
    input embedding (of which a token uses one row), or all but both tables. A table that is
    embedding and head at once counts as the head, so leaving out the embedding takes nothing off.
    """

    total: int
    by_role: Mapping[str, Share]
    active: int
    active_without_input_embedding: int
    active_without_embeddings: int
    buffers: int

    @property
    def trained(self) -> int:
        """Parameters that are not frozen."""
        return sum(share.trained for share in self.by_role.values())


def count(root: Component, tied: bool) -> Counts:
    """The parameters of a model; `tied` where its head uses the embedding's table."""
    trained = _trained(root)
    by_role = {role: Share(*said, trained[role]) for role, said in root.totals().items()}
    active = sum(share.active for share in by_role.values())
    embedding, head = (by_role[r].count if r in by_role else 0 for r in ("embedding", "head"))
    return Counts(
        total=sum(share.count for share in by_role.values()),
        by_role=by_role,
        active=active,
        active_without_input_embedding=active - (0 if tied else embedding),
        active_without_embeddings=active - embedding - head,
        buffers=_buffers(root),
    )


def _trained(root: Component) -> Counter[str]:
    """Parameters that are trained, by role, over all call sites."""
    found: Counter[str] = Counter()
    for _, component in root.walk():
        for weight in component.weights.values():
            found[weight.role] += weight.count if weight.trained else 0
    return found


def _buffers(root: Component) -> int:
    """Values of the buffers that checkpoints hold, over all call sites."""
    total = 0
    for _, component in root.walk():
        for buffer in component.buffers.values():
            size = 1
            for width in buffer.shape:
                size *= width
            total += size if buffer.persistent else 0
    return total
