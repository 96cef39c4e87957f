"""Reads a plan's numbers off its graph: parameters, FLOPs, memory, and whether a GPU holds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from moegen.gpus import GPUS, Gpu
from moegen.graph.component import Component, Weight
from moegen.optimizers import OPTIMIZERS
from moegen.parameters import Counts, count
from moegen.passes.cost import Costs, Summary
from moegen.passes.refs import Ref, resolve, size
from moegen.passes.schedule import Path, critical_path, recurrent_steps
from moegen.planner import Plan

Certainty = Literal["exact", "bound", "assumed"]

ALLOWANCE = 1024**3  # bytes: CUDA context, libraries' workspaces, fragmentation


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token for one role: forward, and backward (with recomputation, if any)."""

    forward: Fraction
    backward: Fraction


@dataclass(frozen=True)
class Line:
    """One line of a memory table: bytes, how sure they are, and why."""

    name: str
    bytes: int
    certainty: Certainty
    note: str


@dataclass(frozen=True)
class Memory:
    """Lines that add up to what a GPU must hold."""

    lines: tuple[Line, ...]

    @property
    def total(self) -> int:
        """All lines together, bytes."""
        return sum(line.bytes for line in self.lines)


@dataclass(frozen=True)
class Fit:
    """Whether a GPU holds what is asked, and what to change if it does not.

    forward: the time below which no forward pass of the workload can be, by the roofline.
    """

    gpu: Gpu
    training: bool
    inference: bool
    advice: tuple[str, ...]
    forward: Path


@dataclass(frozen=True)
class Estimate:
    """Everything that `moegen estimate` prints.

    counts: parameters by role and the active counts; flops: of one unit of the model (a token, an
    image) by role, averaged over a causal sequence where there is one; sides: of one unit of each
    sort, where a model tells sorts apart; by_task: parameters that a unit uses for each task;
    decode_flops: of one new token after a full context; weight_bytes: by role; cache_bytes: for
    batch sequences of the context's length; both None for models that do not decode; training and
    inference: what a single GPU must hold; beside: the eager backend's estimate, where another one
    is asked for.
    """

    plan: Plan
    counts: Counts
    flops: dict[str, Flops]
    decode_flops: Fraction | None
    weight_bytes: dict[str, int]
    cache_bytes: int | None
    optimizer: str
    checkpointing: bool
    training: Memory
    inference: Memory
    fit: Fit | None
    sides: dict[str, dict[str, Flops]] = field(default_factory=dict)
    by_task: dict[str, int] = field(default_factory=dict)
    backend: str = "eager"
    beside: Estimate | None = None

    @property
    def forward_flops(self) -> Fraction:
        """FLOPs of one unit's forward pass, all roles."""
        return sum((f.forward for f in self.flops.values()), Fraction(0))

    @property
    def training_flops(self) -> Fraction:
        """FLOPs of one unit's forward and backward pass, all roles."""
        return sum((f.forward + f.backward for f in self.flops.values()), Fraction(0))

    @property
    def cache_bytes_per_token(self) -> Fraction | None:
        """Cache bytes of one position of one sequence, averaged over the context; None for a state,
        which is as large for any.
        """
        if self.cache_bytes is None:
            return None
        work = self.plan.workload
        longest = max(positions for _, positions in caches(self.plan).values())
        return Fraction(self.cache_bytes, work.batch * longest) if longest else None

    @property
    def recurrent_steps(self) -> int:
        """Steps of a forward pass that wait for each other, because each needs the last's state."""
        return recurrent_steps(self.plan.root, "forward")


def estimate(
    plan: Plan,
    *,
    optimizer: str = "adamw-mixed",
    checkpointing: bool = False,
    gpu: str | None = None,
) -> Estimate:
    """The estimate of a plan at its workload; raises KeyError for unknown names."""
    forward = plan.costs["forward, checkpointed" if checkpointing else "forward"]
    work = plan.workload
    units = plan.spec.model.units(work.batch, work.sequence)
    step = plan.costs.get("step")
    totals = plan.root.totals()
    training = _training(plan, forward, optimizer, checkpointing)
    inference = _inference(plan)
    made = Estimate(
        plan=plan,
        counts=count(plan.root, tied=plan.spec.model.tied),
        flops=_per_unit(forward, plan.costs["loss"], units),
        decode_flops=Fraction(sum(step.flops.values()), work.batch) if step else None,
        weight_bytes={role: weight for role, (_, _, weight) in totals.items()},
        cache_bytes=size(plan.results["new_cache"]) if step else None,
        optimizer=optimizer,
        checkpointing=checkpointing,
        training=training,
        inference=inference,
        fit=None,
        sides=_sides(plan, forward, checkpointing),
        by_task=plan.spec.model.by_task(plan.root),
    )
    if gpu is None:
        return made
    from dataclasses import replace

    return replace(made, fit=_fit(made, GPUS[gpu]))


def _per_unit(forward: Summary, loss: Summary, units: int) -> dict[str, Flops]:
    roles = sorted(set(forward.flops) | set(loss.flops))
    rows = {
        role: Flops(
            Fraction(forward.flops[role] + loss.flops[role], units),
            Fraction(forward.backward[role] + loss.backward[role], units),
        )
        for role in roles
    }
    return {role: row for role, row in rows.items() if row.forward}


def _sides(plan: Plan, forward: Summary, checkpointing: bool) -> dict[str, dict[str, Flops]]:
    """FLOPs of one unit of each sort by role; what no child has is the last one's."""
    work = plan.workload
    sides = plan.spec.model.sides(work.batch, work.sequence)
    if not sides:
        return {}
    costs = Costs(("layers",) if checkpointing else ())
    calls = costs.program(plan.root, "forward", frozenset())
    calls.summary()
    loss = plan.costs["loss"]
    rest = Summary(forward.flops + loss.flops, forward.backward + loss.backward)
    found = {}
    for side in sides[:-1]:
        own = next(c.summary() for n, c in calls.below.items() if str(n.target) == side.child)
        rest.flops.subtract(own.flops)
        rest.backward.subtract(own.backward)
        found[side.unit] = _per_unit(own, Summary(), side.count)
    return {**found, sides[-1].unit: _per_unit(rest, Summary(), sides[-1].count)}


def weights(root: Component) -> Iterator[tuple[Weight, int]]:
    """Every distinct parameter with the number of its copies in the model."""
    sites: dict[int, int] = {}
    components: dict[int, Component] = {}
    for _, component in root.walk():
        sites[id(component)] = sites.get(id(component), 0) + 1
        components[id(component)] = component
    for key, component in components.items():
        for weight in component.weights.values():
            yield weight, sites[key]


def _kept_output(plan: Plan, forward: Summary) -> int:
    """Bytes of what the loss is computed from, unless the forward pass keeps it already."""
    output = plan.results["forward"]
    (last,) = (n for n in plan.root.programs["forward"].graph.nodes if n.op == "output")
    source = resolve(Ref(last.args[0], (output._fields[0],)), lambda node, path: Ref(node, path))
    return 0 if source in forward.kept else size(output[0])


def _training(plan: Plan, forward: Summary, optimizer: str, checkpointing: bool) -> Memory:
    scheme = OPTIMIZERS[optimizer]
    loss = plan.costs["loss"]
    held = list(weights(plan.root))
    parameters = sum(w.bytes * n for w, n in held)
    trained = [(w, n) for w, n in held if w.trained]
    gradients = sum(scheme.gradient(w) * n for w, n in trained)
    state = sum(scheme.state(w) * n for w, n in trained)
    saved = forward.saved + _kept_output(plan, forward) + loss.saved
    peak = max(forward.peak_forward, loss.peak_forward, loss.peak_backward, forward.peak_backward)
    kept = "layers' inputs and what lies outside layers" if checkpointing else "each tensor once"
    return Memory(
        (
            Line("parameters", parameters, "exact", "as the spec's precision keeps them"),
            Line("gradients", gradients, "exact", scheme.gradient_note),
            Line("optimizer state", state, "exact", scheme.note),
            Line("saved activations", saved, "bound", f"{kept}; routed rows at their maximum"),
            Line("peak temporary", peak, "bound", "values and gradients alive at once"),
            Line("allowance", ALLOWANCE, "assumed", "CUDA context, workspaces, fragmentation"),
        )
    )


def caches(plan: Plan) -> dict[str, tuple[int, int]]:
    """The parts of what decoding keeps by name: bytes, and positions of each sequence."""
    parts = plan.spec.model.caches(plan.results["new_cache"], plan.workload.sequence)
    return {name: (size(part), positions) for name, (part, positions) in parts.items()}


def _inference(plan: Plan) -> Memory:
    parameters = sum(w.bytes * n for w, n in weights(plan.root))
    work, step = plan.workload, plan.costs.get("step")
    cache, program, what = [], step or plan.costs["forward"], "one forward pass"
    if step is not None:
        cache = [
            Line(name, held, "exact", f"{work.batch} x {positions or 'any'} positions")
            for name, (held, positions) in caches(plan).items()
        ]
        what = "one decoding step"
    return Memory(
        (
            Line("parameters", parameters, "exact", "as the spec's precision keeps them"),
            *cache,
            Line("peak temporary", program.saved + program.peak_forward, "bound", what),
            Line("allowance", ALLOWANCE, "assumed", "CUDA context, workspaces, fragmentation"),
        )
    )


def _fit(made: Estimate, gpu: Gpu) -> Fit:
    training = made.training.total <= gpu.memory
    inference = made.inference.total <= gpu.memory
    advice = tuple(_advice(made, gpu, training, inference))
    forward = critical_path(made.plan.root, "forward", gpu)
    return Fit(gpu, training, inference, advice, forward)


def _advice(made: Estimate, gpu: Gpu, training: bool, inference: bool) -> Iterator[str]:
    """What to change so that it fits, the cheapest first."""
    lines = {line.name: line.bytes for line in made.training.lines}
    over = made.training.total - gpu.memory
    if not training:
        saved = lines["saved activations"]
        if not made.checkpointing:
            kept = estimate(made.plan, optimizer=made.optimizer, checkpointing=True)
            less = made.training.total - kept.training.total
            if less > 0:
                verdict = ", which is enough" if less >= over else ""
                yield f"--checkpointing frees {less / 1e9:.1f} GB{verdict}"
        if saved >= over and made.plan.workload.batch > 1:
            yield "a smaller --batch: saved activations alone are more than what is missing"
        for name, scheme in OPTIMIZERS.items():
            state = sum(
                (scheme.state(w) + scheme.gradient(w)) * n
                for w, n in weights(made.plan.root)
                if w.trained
            )
            less = lines["optimizer state"] + lines["gradients"] - state
            if less >= over > 0:
                yield f"--optimizer {name} frees {less / 1e9:.1f} GB, which is enough"
        ranks = -(-made.training.total // gpu.memory)
        yield f"at least {ranks} of these GPUs with everything sharded evenly (FSDP2)"
    if not inference:
        ranks = -(-made.inference.total // gpu.memory)
        yield f"inference needs at least {ranks} of these GPUs, weights and cache sharded evenly"
