"""The family of models: the root of what a spec describes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from moegen.graph.layer import Layer
from moegen.spec.element import Kinds, Path


class Model(Kinds, Layer):
    """A whole network. `forward` takes what a user has and returns what training needs."""

    default_kind: ClassVar[str | None] = "decoder"

    runtime: ClassVar[str] = ""  # the class that emitted models of this kind derive from

    max_sequence: int = Field(4096, ge=1, le=10**9, description="longest sequence to serve")

    @property
    def tied(self) -> bool:
        """Whether the output head uses the embedding's table."""
        return False

    def warnings(self) -> Iterator[tuple[Path, str]]:
        """Yield (path, sentence) for what is allowed but seldom meant."""
        yield from ()

    def examples(self, batch: Any, sequence: Any, new: int = 1) -> dict[str, Any]:
        """Inputs of each program, in the order to run them, as functions of results so far."""
        raise TypeError(f"{type(self).__name__} takes no inputs")
