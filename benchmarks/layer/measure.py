"""One workload: every variant is checked, then those that are right are measured side by side."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.layer.check import attempt, check
from benchmarks.layer.inputs import Batch, Inputs, make_inputs
from benchmarks.layer.memory import kept_by_graph, kept_by_hooks, peak
from benchmarks.layer.predict import kernel_times, predicted
from benchmarks.layer.record import Case, Outcome
from benchmarks.layer.reference import reference
from benchmarks.layer.shapes import Workload
from benchmarks.layer.timing import (
    LEAST_SAMPLES,
    MOST_SAMPLES,
    Samples,
    Step,
    capture,
    interleaved,
)
from benchmarks.layer.variants import DENSE, Absent, Forward, Variant, dense_steps

# inference: forward without gradients; forward: with what backward needs kept; both: forward and
# backward; "routed" ones choose experts from the router's logits first; graph: inference replayed
# as a CUDA graph, so that launching is not measured.
TRAINING = ("inference", "forward", "both", "routed inference", "routed both")
DECODING = ("inference", "graph", "routed inference")
# Passes longer than this are not profiled.
LONG = 200.0


@dataclass(frozen=True)
class Options:
    """How long and what to measure."""

    seconds: float = 3.0
    kinds: tuple[str, ...] = (*TRAINING, "graph")
    least: int = LEAST_SAMPLES
    most: int = MOST_SAMPLES
    dense: bool = False
    profile: bool = False
    own_time: bool = False


def kinds_of(work: Workload, device: torch.device, options: Options) -> list[str]:
    """The kinds of step that a workload is measured in."""
    suited = DECODING if work.decodes else TRAINING
    return [
        kind
        for kind in suited
        if kind in options.kinds and (kind != "graph" or device.type == "cuda")
    ]


def routed(forward: Forward, variant: Variant, work: Workload) -> Forward:
    """The pass from logits on: the variant's choice of experts goes before it."""

    def run(batch: Batch) -> Tensor:
        experts, weights = variant.routes(batch.logits, work.k, work.torch_dtype)
        chosen = replace(batch, experts=experts, experts32=experts.int(), weights=weights)
        return forward(chosen)

    return run


def step(kind: str, forward: Forward, inputs: Inputs) -> Step:
    """A step of a kind on one of the copies of the inputs."""
    batches = inputs.batches

    def inference(i: int) -> Tensor:
        with torch.no_grad():
            return forward(batches[i % len(batches)])

    def training(i: int) -> Tensor:
        return forward(batches[i % len(batches)])

    def both(i: int) -> None:
        inputs.clear()
        batch = batches[i % len(batches)]
        torch.autograd.backward(forward(batch), batch.grad)

    if kind.endswith("inference") or kind == "graph":
        return inference
    return training if kind == "forward" else both


@dataclass
class Bench:
    """One workload being measured; `right` has the passes of the variants that match."""

    work: Workload
    device: torch.device
    options: Options
    inputs: Inputs
    case: Case
    right: dict[str, tuple[Variant, Forward, Outcome]] = field(default_factory=dict)

    def check(self, variants: list[Variant], absent: dict[str, str]) -> None:
        """Compare all with the reference; `absent` gets what cannot run on this machine."""
        expected = reference(self.work, self.inputs, self.inputs.batches[0])
        self.case.reference = expected.kind
        for variant in variants:
            outcome = Outcome(variant.name, variant.family, why=variant.refuses(self.work))
            if outcome.why:
                outcome.state = "refused"
                self.case.outcomes.append(outcome)
                continue
            try:
                forward = variant.make(self.work, self.inputs)
                test = partial(check, outcome, forward, self.inputs, expected, self.work)
                failed = attempt(test)
            except Absent as reason:
                absent[variant.name] = str(reason)
                continue
            if failed:
                outcome.state, outcome.why = "failed", failed
            self.case.outcomes.append(outcome)
            if outcome.state == "right":
                self.right[variant.name] = (variant, forward, outcome)

    def memory(self) -> None:
        """Bytes kept for backward, and the most that a whole step holds."""
        for name, (variant, forward, outcome) in self.right.items():
            run = partial(self._memory, variant, forward, outcome)
            self._note(name, "kept bytes", attempt(run))
            self.inputs.clear()

    def _memory(self, variant: Variant, forward: Forward, outcome: Outcome) -> None:
        outcome.peak = peak(partial(step("both", forward, self.inputs), 0), self.device)
        self.inputs.clear()
        run = partial(forward, self.inputs.batches[0])
        # Hooks would have the pass compiled anew, and for another kind of pass.
        measure = kept_by_graph if variant.compiled else kept_by_hooks
        kept = measure(run, self.inputs, self.work)
        outcome.kept, outcome.kept_routing = kept.activations, kept.routing

    def times(self, kind: str) -> None:
        """Medians of a kind of step, and speed-ups of ours over the fastest peer."""
        steps: dict[str, Step] = {}
        for name, (variant, forward, _) in self.right.items():
            if kind == "graph" and not variant.captures:
                continue
            if kind.startswith("routed"):
                forward = routed(forward, variant, self.work)
            made = step(kind, forward, self.inputs)
            failed = attempt(partial(made, 0))
            if not failed and kind == "graph":
                graphs: list[Step] = []
                failed = attempt(partial(capture, made, len(self.inputs.batches), graphs))
                made = graphs[0] if graphs else made
            if failed:
                self._note(name, kind, failed)
            else:
                steps[name] = made
        if self.case.outcome(DENSE) is not None and not kind.startswith("routed"):
            dense = dense_steps(self.work, self.device)
            steps[DENSE] = dense.get(kind, dense["inference"])
        limits = self.options
        times = (limits.seconds, limits.most, limits.least)
        found = interleaved(steps, self.device, *times, own_time=limits.own_time)
        self._write_down(kind, found)
        self.inputs.clear()

    def profile(self) -> None:
        """Times by kernel, of variants that are not very slow."""
        kind = "inference" if self.work.decodes else "both"
        for _, forward, outcome in self.right.values():
            if outcome.milliseconds.get(kind, LONG) < LONG:
                outcome.kernels = kernel_times(step(kind, forward, self.inputs))
        self.inputs.clear()

    def _note(self, name: str, doing: str, why: str) -> None:
        outcome = self.right[name][2]
        if why:
            outcome.why += f"{'; ' if outcome.why else ''}{doing}: {why}"

    def _write_down(self, kind: str, samples: Samples) -> None:
        peers = {}
        for outcome in self.case.outcomes:
            if outcome.variant in samples.of:
                outcome.milliseconds[kind] = samples.median(outcome.variant)
                outcome.samples[kind] = len(samples.of[outcome.variant])
                if not outcome.family.startswith(("ours", "dense")):
                    peers[outcome.variant] = outcome.milliseconds[kind]
        if not peers or self.case.wrong:
            return
        fastest = min(peers, key=lambda name: peers[name])
        self.case.fastest_peer[kind] = fastest
        for outcome in self.case.outcomes:
            if outcome.family.startswith("ours") and outcome.variant in samples.of:
                outcome.speedups[kind] = samples.ratio(outcome.variant, fastest)


def make_case(
    work: Workload,
    variants: list[Variant],
    device: torch.device,
    options: Options,
    absent: dict[str, str],
) -> Case:
    """Check all variants, measure those that are right; `absent` gets what cannot run here."""
    torch._dynamo.reset()
    inputs = make_inputs(work, device)
    case = Case(work, "", inputs.touched_experts(), predicted=predicted(work, device))
    bench = Bench(work, device, options, inputs, case)
    bench.check(variants, absent)
    if not work.decodes:
        bench.memory()
    if options.dense and not work.decodes:
        case.outcomes.append(Outcome(DENSE, "dense", why="the layer's FLOPs, as one expert"))
    for kind in kinds_of(work, device, options):
        bench.times(kind)
    if options.profile and device.type == "cuda":
        bench.profile()
    return case
