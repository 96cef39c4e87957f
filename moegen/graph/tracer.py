"""The tracer behind a builder: nodes know their names, sections and origins."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import fx

from moegen.graph import meta
from moegen.graph.fault import short
from moegen.graph.names import assigned, author_frame
from moegen.spec.element import Path

# Attributes of tensors and of torch's return types that are values, not methods.
_FACTS = {"shape", "dtype", "device", "ndim", "values", "indices", "T", "mT"}


class NamedProxy(fx.Proxy):
    """A proxy whose parts are named like the variables that its author unpacks them into."""

    def __iter__(self) -> Iterator[fx.Proxy]:
        """Unpack into as many parts as there are targets on the author's line."""
        names = assigned(author_frame())
        if not isinstance(names, tuple):
            return super().__iter__()
        return iter([self._part(i, name) for i, name in enumerate(names)])

    def _part(self, index: int, name: str) -> fx.Proxy:
        part: fx.Proxy = self[index]  # type: ignore[index]
        part.node.meta[meta.NAME] = name
        part.node.meta[meta.PART] = True
        return part

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        """Read a field of a record at once, so that the node is made on the author's line."""
        attribute = super().__getattr__(name)
        if name in _FACTS or not hasattr(torch.Tensor, name):
            _ = attribute.node
        return attribute


class ComponentTracer(fx.proxy.GraphAppendingTracer):
    """Appends nodes to one graph, and notes on each its name, section and origin."""

    def __init__(self, graph: fx.Graph, path: Path) -> None:
        """Trace into `graph` on behalf of the element at `path` of the spec."""
        super().__init__(graph)
        self.path = path
        self.section: str | None = None

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Make the node, with where it comes from."""
        node = super().create_node(*args, **kwargs)
        frame = author_frame()
        node.meta[meta.ORIGIN] = meta.Origin(self.path, _place(frame))
        if self.section:
            node.meta[meta.SECTION] = self.section
        # Attributes such as `.shape` become nodes where they are used, not where they are written.
        late = node.op == "placeholder" or node.target is getattr
        name = None if late else assigned(frame)
        if isinstance(name, str):
            node.meta[meta.NAME] = name
        return node

    def create_arg(self, a: Any) -> Any:
        """Arguments of nodes; a real tensor among them would fix sizes."""
        if isinstance(a, torch.Tensor):
            raise fx.proxy.TraceError(
                "a tensor made while tracing has fixed sizes; make it from values of the graph"
            )
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Proxies that know how to name their parts."""
        return NamedProxy(node, self)


def _place(frame: FrameType | None) -> str:
    """A line of an element's source, as `arch/moe.py:31` or a plug-in's own path."""
    if frame is None:
        return ""
    return f"{short(frame.f_code.co_filename)}:{frame.f_lineno}"
