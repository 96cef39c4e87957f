"""Layers: the elements that compute something, and so become components."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

from moegen.spec.element import Element

if TYPE_CHECKING:
    from moegen.graph.builder import Builder


class Layer(Element):
    """An element with programs: methods in plain torch that the builder traces.

    `forward` is the training and evaluation program. A layer may have more, each a method
    `(self, b, *inputs)` named in `programs`; a parent's program of the same name calls them,
    and calls `forward` of layers that lack it.

    scope: a word before the names of the classes inside, which are then apart from those of equal
    elements elsewhere: an encoder and a decoder see other tokens, so that costs differ.
    """

    scope: ClassVar[str] = ""

    def programs(self) -> tuple[str, ...]:
        """Names of the methods that are traced."""
        return ("forward",)

    def given(self) -> tuple[str, ...]:
        """Names of further inputs, in place of a method's `**` parameter, each once."""
        return ()

    def class_name(self) -> str:
        """What the emitted class is called."""
        return type(self).__name__

    def describe(self, spec: Any) -> str:
        """What the emitted class says it is, in a sentence with this spec's numbers."""
        return (inspect.getdoc(type(self)) or "").splitlines()[0]

    def forward(self, b: Builder, *inputs: Any, **given: Any) -> Any:
        """Compute the outputs from the inputs; the names of the inputs are those of the method."""
        raise TypeError(f"{type(self).__name__} has no forward")
