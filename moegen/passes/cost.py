"""Annotates every node with what it costs, and sums programs: FLOPs, traffic, memory."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from moegen.graph import meta
from moegen.graph.component import Component
from moegen.ops import torch_costs
from moegen.ops.gradients import scale_gradient
from moegen.ops.op import Op, op_of
from moegen.passes.gradients import Inputs, floating_inputs, needed
from moegen.passes.memory import peak_backward, peak_forward
from moegen.passes.refs import Ref, at, handed, made, resolve, size


@dataclass(frozen=True)
class Cost:
    """Of one node: FLOPs forward and backward, bytes moved forward, bytes kept for backward.

    `saved` counts a tensor at every node that keeps it; the program's sum counts it once.
    """

    flops: int = 0
    backward: int = 0
    moved: int = 0
    saved: int = 0


@dataclass
class Summary:
    """Of one program of a component, all it calls included.

    flops and backward by role; saved: bytes kept for backward, each tensor once, inputs aside;
    kept: the tensors behind that, inputs as references to placeholders; peak_forward and
    peak_backward: the most bytes alive at once beside those kept; flows: whether what the program
    gives needs a gradient.
    """

    flops: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    moved: int = 0
    saved: int = 0
    kept: set[Ref] = field(default_factory=set)
    peak_forward: int = 0
    peak_backward: int = 0
    flows: bool = True


class Costs:
    """Summaries of components' programs, after the shapes pass; each is made once.

    recompute: names of children that are checkpointed: only their inputs are kept, and the
    rest is computed again in the backward pass.
    """

    def __init__(self, recompute: tuple[str, ...] = ()) -> None:
        """Sum with or without checkpointing."""
        self.recompute = recompute
        self.programs: dict[tuple[int, str, Inputs], _Program] = {}
        self.costs: dict[fx.Node, Cost] = {}

    def of(
        self, component: Component, program: str = "forward", inputs: Inputs | None = None
    ) -> Summary:
        """The summary of a program.

        inputs: those that need a gradient; all that could have one unless said.
        """
        given = floating_inputs(component, program) if inputs is None else inputs
        return self.program(component, program, given).summary()

    def program(self, component: Component, program: str, inputs: Inputs) -> _Program:
        """A program for inputs of which some need a gradient."""
        key = (id(component), program, inputs)
        if key not in self.programs:
            self.programs[key] = _Program(self, component, program, inputs)
        return self.programs[key]

    def note(self, node: fx.Node, cost: Cost) -> None:
        """Leave a node's cost on it; that of the call that needs the most gradients."""
        known = self.costs.get(node)
        if known is None or (cost.backward, cost.saved) > (known.backward, known.saved):
            self.costs[node] = node.meta[meta.COST] = cost

    def checkpointed(self, name: str) -> bool:
        """Whether a child is computed again in the backward pass."""
        return name.split(".")[0] in self.recompute


class _Program:
    """One program while its costs are summed."""

    def __init__(self, costs: Costs, component: Component, program: str, inputs: Inputs) -> None:
        self.costs = costs
        self.component = component
        self.inputs = inputs
        self.graph = component.programs[program].graph
        self.nodes = list(self.graph.nodes)
        self.below: dict[fx.Node, _Program] = {}
        self.grads = needed(component, self.nodes, inputs, self._flows)
        self.out = Summary(flows=any(self.grads[n] for n in self.nodes[-1].all_input_nodes))
        self.summed = False

    def _flows(self, node: fx.Node, inputs: Inputs) -> bool:
        """Whether the result of a call needs a gradient."""
        child = self.component.children[str(node.target)]
        self.below[node] = self.costs.program(child, meta.method(node), inputs)
        return self.below[node].out.flows

    def summary(self) -> Summary:
        """Costs of every node and their sums."""
        if not self.summed:
            self.summed = True
            self._sum()
        return self.out

    def _sum(self) -> None:
        for node in self.nodes:
            if node.op == "call_module":
                self._call(node)
            elif node.op in ("call_function", "call_method"):
                cost = self._cost(node)
                self.costs.note(node, cost)
                role = _role(node, self.component)
                self.out.flops[role] += cost.flops
                self.out.backward[role] += cost.backward
                self.out.moved += cost.moved
        self.out.saved += sum(
            size(at(meta.val(ref.node), ref.path))
            for ref in self.out.kept
            if ref.node.op not in ("placeholder", "get_attr")
        )
        self.out.peak_forward = peak_forward(
            self.nodes, self._own, lambda node: self._inside(node, "peak_forward")
        )
        self.out.peak_backward = peak_backward(
            self.nodes, self.grads, lambda node: self._inside(node, "peak_backward")
        )

    # Nodes

    def _child(self, node: fx.Node) -> tuple[Component, Summary]:
        child = self.component.children[str(node.target)]
        return child, self.below[node].summary()

    def _call(self, node: fx.Node) -> None:
        child, below = self._child(node)
        self.out.flops += below.flops
        self.out.backward += below.backward
        self.out.moved += below.moved
        if self.costs.checkpointed(str(node.target)):
            if self.grads[node]:
                self.out.backward += below.flops  # once more forward
                self._keep(ref for source in node.all_input_nodes for ref in handed(source))
            return
        self.out.saved += below.saved
        inputs = self._inputs(child, meta.method(node), node)
        outer = (Ref(inputs[r.node.name], r.path) for r in below.kept if r.node.name in inputs)
        self._keep(outer)

    def _inputs(self, child: Component, method: str, node: fx.Node) -> dict[str, fx.Node]:
        """The nodes behind a child's placeholders."""
        holders = (n for n in child.programs[method].graph.nodes if n.op == "placeholder")
        pairs = zip(holders, node.args, strict=True)
        return {p.name: a for p, a in pairs if isinstance(a, fx.Node)}

    def _cost(self, node: fx.Node) -> Cost:
        moved = 0
        if made(node) and resolve(Ref(node), self._through) == Ref(node):
            moved = made(node) + sum(made(i) for i in node.all_input_nodes)
        flops, backward = self._flops(node)
        if not self.grads[node]:
            return Cost(flops, 0, moved, 0)
        kept = list(self._saves(node))
        self._keep(kept)
        extra = self._extra(node)
        self.out.saved += extra
        values = (r for r in kept if r.node.op != "get_attr")  # parameters are there anyway
        saved = extra + sum(size(at(meta.val(r.node), r.path)) for r in values)
        return Cost(flops, backward, moved, saved)

    def _flops(self, node: fx.Node) -> tuple[int, int]:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), meta.val)
        known = op_of(node.target)
        ratio: float | Fraction
        if known:
            flops = known.flops(*args, **kwargs) if known.flops else 0
            given = known.backward
            ratio = given(*args, **kwargs) if callable(given) else given
        else:
            formula = torch_costs.FLOPS.get(node.target)
            flops = formula(meta.val(node), *args, **kwargs) if formula else 0
            more = torch_costs.BACKWARD.get(node.target)
            ratio = more(*args, **kwargs) if more else 2.0
        if not self.grads[node]:
            return int(flops), 0
        return int(flops), int(flops * (ratio - self._spared(node, known, ratio)))

    def _spared(self, node: fx.Node, known: Op | None, ratio: float | Fraction) -> Fraction | int:
        """FLOPs over the forward pass's for gradients of arguments that need none."""
        if known and known.shares:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), meta.val)
            shares = known.shares(*args, **kwargs)
            given = inspect.signature(known.reference).bind(*node.args, **node.kwargs).arguments
            needs = {k: isinstance(v, fx.Node) and self.grads[v] for k, v in given.items()}
            return sum((share for name, share in shares.items() if not needs.get(name)), Fraction())
        factors = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if ratio != 2.0 or len(factors) < 2:
            return 0
        return sum(not self.grads[factor] for factor in factors)  # a product for each

    def _saves(self, node: fx.Node) -> Iterator[Ref]:
        """The tensors that a node keeps for backward."""
        known = op_of(node.target)
        if known:
            yield from self._op_saves(node, known)
            return
        for what in torch_costs.SAVES.get(node.target, ()):
            if what == "out":
                yield Ref(node)
            elif what == "factors":
                yield from self._factors(node)
            else:
                value = node.kwargs.get(what) if isinstance(what, str) else _argument(node, what)
                if isinstance(value, fx.Node) and isinstance(meta.val(value), Tensor):
                    yield Ref(value)

    def _op_saves(self, node: fx.Node, known: Any) -> Iterator[Ref]:
        bound = inspect.signature(known.reference).bind(*node.args, **node.kwargs).arguments
        saves = known.saves
        if callable(saves):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), meta.val)
            saves = saves(*args, **kwargs)
        for name in saves:
            whole, _, index = name.partition(".")
            if whole == "out":
                yield Ref(node, (int(index),) if index else ())
            elif isinstance(bound.get(name), fx.Node):
                yield Ref(bound[name])

    def _factors(self, node: fx.Node) -> Iterator[Ref]:
        a: Any
        b: Any
        a, b = node.args[0], node.args[1]
        for one, other in ((a, b), (b, a)):
            both = isinstance(one, fx.Node) and isinstance(other, fx.Node)
            if both and self.grads[other] and isinstance(meta.val(one), Tensor):
                yield Ref(one)

    def _extra(self, node: fx.Node) -> int:
        known = op_of(node.target)
        formula = known.extra if known else torch_costs.EXTRA.get(node.target)
        if formula is None:
            return 0
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), meta.val)
        return int(formula(*args, **kwargs))

    # Kept tensors

    def _keep(self, refs: Any) -> None:
        for ref in refs:
            source = resolve(ref, self._through)
            if source is not None and source.node.op != "get_attr":
                self.out.kept.add(source)

    def _through(self, node: fx.Node, path: tuple[str | int, ...]) -> Ref | None:
        """What a child's result is to its caller: its own input, kept by the child, or new."""
        child, below = self._child(node)
        if self.costs.checkpointed(str(node.target)):
            return Ref(node, path)
        graph = child.programs[meta.method(node)].graph
        last = next(iter(reversed(graph.nodes)))
        result: Any = last.args[0]
        rest = path
        while rest and isinstance(result, (tuple, list)):
            index = rest[0]
            if not isinstance(index, int):
                break
            result, rest = result[index], rest[1:]
        if not isinstance(result, fx.Node):
            return Ref(node, path)
        source = resolve(Ref(result, rest), self.below[node]._through)
        if source is None or (source in below.kept and source.node.op != "placeholder"):
            return None
        if source.node.op == "placeholder":
            outer = self._inputs(child, meta.method(node), node).get(source.node.name)
            return Ref(outer, source.path) if outer is not None else None
        return Ref(node, path)

    # Peaks

    def _own(self, node: fx.Node) -> int:
        """Bytes of a node's value where it is new memory that is not kept for backward."""
        if node.op not in ("call_function", "call_method", "call_module"):
            return 0
        source = resolve(Ref(node), self._through)
        if source != Ref(node) or source in self.out.kept:
            return 0
        return made(node)

    def _inside(self, node: fx.Node, peak: str) -> int:
        """What a call needs inside, beside its result; all it keeps, if it is computed again."""
        if node.op != "call_module":
            return self._workspace(node)[peak == "peak_backward"]
        below = self._child(node)[1]
        again = below.saved if self.costs.checkpointed(str(node.target)) else 0
        return int(getattr(below, peak)) + again

    def _workspace(self, node: fx.Node) -> tuple[int, int]:
        """Bytes that an op needs while it runs, forward and backward."""
        known = op_of(node.target)
        inside = node.meta.get(meta.INSIDE) or (known.inside if known else None)
        if inside is None:
            return 0, 0
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), meta.val)
        return inside(*args, **kwargs)


def _argument(node: fx.Node, index: int | str) -> Any:
    return node.args[index] if isinstance(index, int) and index < len(node.args) else None


def _source(node: fx.Node) -> fx.Node:
    """The value that a node shows in another format or shape."""
    while True:
        found = resolve(Ref(node), lambda inner, path: Ref(inner, path)) or Ref(node)
        cast = found.node.target in ("to", scale_gradient)
        if not cast:
            return found.node
        node = found.node.all_input_nodes[0]


def _role(node: fx.Node, component: Component) -> str:
    """What a node's work is for: the role of the parameter it uses, else its component's."""
    for source in map(_source, node.all_input_nodes):
        weight = component.weights.get(str(source.target)) if source.op == "get_attr" else None
        if weight is not None:
            tied = weight.role == "embedding" and node.target is F.linear
            return "head" if tied else weight.role
    return component.role
