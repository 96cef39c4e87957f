"""Multi-task models of vectors: experts that all tasks share, and a gate and a tower each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.activation import Activation, ReLU
from moegen.arch.init import ZEROS
from moegen.arch.mixture.experts import Width
from moegen.arch.mixture.layer import MixtureLayer
from moegen.arch.mixture.targets import Target, no_length
from moegen.arch.model import Model
from moegen.graph.builder import Builder
from moegen.graph.component import Component
from moegen.graph.layer import Layer
from moegen.ops.experts import gather_rows
from moegen.ops.importance import dense_gates
from moegen.ops.mixtures import chosen_by_any, ungroup_rows
from moegen.ops.routing import expert_load, sort_by_expert
from moegen.spec.element import Element, OneOf, Path
from moegen.spec.names import identifier
from moegen.spec.words import counted, listed


class Task(Element):
    """What one task predicts, and how much its loss counts."""

    shorthand = "target"

    target: Annotated[Target, OneOf(Target)] = Field(
        description="what is predicted: values, binary, or classes", examples=["binary"]
    )
    weight: float = Field(1.0, gt=0, le=1e6, description="factor on its loss")


class Tower(Element):
    """The network that a task has of its own, over what its gate mixed."""

    hidden: tuple[Width, ...] = Field((), description="widths of its hidden layers", examples=[[8]])
    activation: Annotated[Activation, OneOf(Activation)] = Field(
        ReLU(), description="activation of hidden layers, e.g. relu"
    )
    bias: bool = Field(True, description="whether its matrices have a bias")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """A plain activation."""
        if self.activation.gated:
            sentence = f"{self.activation.kind} is gated; say one that is not, such as relu"
            yield ("activation",), sentence


class TaskTower(Layer):
    """A tower with as many outputs as its task has."""

    tower: Tower = Field(description="its hidden layers")
    outputs: int = Field(description="numbers of an output")

    def class_name(self) -> str:
        """What users know it as."""
        return "Tower"

    def describe(self, spec: Any) -> str:
        """`Tower of a task: 8 hidden units to 1 number.`"""
        wide = f"{listed([f'{n:,}' for n in self.tower.hidden], 'and')} hidden units to "
        wide = wide if self.tower.hidden else ""
        return f"Tower of a task: {wide}{counted(self.outputs, 'number')}."

    def forward(self, b: Builder, x: Any) -> Any:
        """x [B, n] to the task's outputs [B, o]."""
        width, tower = b.width, self.tower
        for index, wide in enumerate((*tower.hidden, self.outputs)):
            name = f"hidden_{index + 1}" if index < len(tower.hidden) else "output"
            bias = b.param(f"{name}_bias", wide, init=ZEROS) if tower.bias else None
            x = F.linear(x, b.param(name, wide, width), bias)
            if index < len(tower.hidden):
                x = tower.activation.apply(x)
            width = wide
        return x


class Gate(MixtureLayer):
    """The gate of a task: weights of all experts, 0 for those not chosen."""

    def describe(self, spec: Any) -> str:
        """`Gate over 8 experts: all for every example.`"""
        met = "all" if self.dense else f"{self.chosen}"
        return f"Gate over {counted(self.num_experts, 'expert')}: {met} for every example."

    def programs(self) -> tuple[str, ...]:
        """Its weights."""
        return ("forward",)

    def forward(self, b: Builder, x: Any) -> Any:
        """x [B, d] to gates [B, E] and what routing did."""
        scored = self._scored(b, x)
        gates, gate = scored.scores, self.router.gate
        if self.dense:
            if gate.normalize == "constant":
                gates = gates.new_ones(gates.shape)
            gates = gates * gate.scale if gate.scale != 1.0 else gates
            best = scored.scores.argmax(-1, keepdim=True)
        else:
            path = ("router", "select")
            best = b.inline(self.router.select, "choose", self, scored, path=path)
            weights = b.inline(gate, "weights", scored, best, path=("router", "gate"))
            gates = dense_gates(weights, best, self.num_experts)
        if b.spec.precision.router_dtype != b.spec.precision.compute_dtype:
            gates = gates.to(b.spec.precision.compute_dtype)
        load = expert_load(best, self.num_experts, scored.valid)
        return gates, self._routing(b, scored, self._chosen(x, gates, best, load))


class Multitask(Model):
    """Several tasks of one example: MMoE, one gate for all (OMoE), or a shared bottom."""

    runtime: ClassVar[str] = "MultitaskModel"
    unit: ClassVar[str] = "example"
    records: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        "Output": (
            "What the model returns for training.",
            {
                "outputs": "[B, n] of each task, by name",
                "losses": "auxiliary, weighted: add them to the loss",
                "routing": "one record for each gate",
            },
        ),
        "Routing": (
            "What a gate did with the examples of a batch.",
            {
                "load": "[E], examples that chose each expert, or whose best one it is",
                "dropped": "[], 0: nothing is refused",
                "probability": "[E], mean score of each expert",
                "entropy": "[], of the scores, mean over examples, in nats",
                "losses": "this gate's own, weighted",
            },
        ),
    }

    kind: Literal["multitask"] = "multitask"
    inputs: int = Field(ge=1, le=10**7, description="numbers of an example")
    mixture: MixtureLayer = Field(description="the experts that tasks share, and their gates")
    gates: Literal["task", "shared", "none"] = Field(
        "task",
        description="a gate for each task (MMoE), one for all (OMoE), or none (a shared bottom)",
    )
    tower: Tower = Field(Tower(), description="the network that each task has of its own")
    tasks: dict[str, Task] = Field(
        min_length=1, description="tasks by name, each with its target", examples=[{"y": "values"}]
    )

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What a shared mixture can be."""
        mixture = self.mixture
        if mixture.width is None:
            yield ("mixture",), "width is missing: how many numbers an expert gives"
        for name in ("patches", "margin", "anneal", "stochastic"):
            if getattr(mixture, name) is not None:
                yield ("mixture", name), f"{name} is for kind: mixture"
        if self.gates == "none" and mixture.num_experts > 1:
            sentence = f"a shared bottom is one network, not {mixture.num_experts} experts"
            yield ("gates",), f"{sentence}; give experts: 1, or gates: task"
        if self.gates == "none" and (mixture.losses or "router" in mixture.model_fields_set):
            name = "losses" if mixture.losses else "router"
            yield ("mixture", name), f"there is no gate, so {name} has no use"
        for name in self.tasks:
            if identifier(name) != name:
                yield (
                    ("tasks", name),
                    f"{name!r} is no name of a variable; write {identifier(name)}",
                )

    def describe(self, spec: Any) -> str:
        """`Multi-task model on 100 numbers: income and marital, a gate each.`"""
        gates = {"task": "a gate each", "shared": "one gate", "none": "a shared bottom"}[self.gates]
        return f"Multi-task model on {self.inputs} numbers: {listed(self.tasks, 'and')}, {gates}."

    # Facts

    def given(self) -> tuple[str, ...]:
        """What the loss is of: outputs and targets, task by task."""
        return tuple(f"{task}_{what}" for task in self.tasks for what in ("output", "target"))

    def programs(self) -> tuple[str, ...]:
        """Training, its loss, and predictions."""
        return ("forward", "loss", "pool")

    def length(self, asked: int | None) -> int:
        """Examples have no length."""
        return no_length(asked)

    def units(self, batch: int, sequence: int) -> int:
        """Examples."""
        return batch

    def workload(self, batch: int, sequence: int) -> str:
        """`32 examples`."""
        return counted(batch, self.unit)

    def examples(self, batch: Any, sequence: Any, new: int = 1) -> dict[str, Any]:
        """Inputs of each program."""

        def pairs(done: Any) -> tuple[Any, ...]:
            found: list[Any] = []
            for name, task in self.tasks.items():
                found += [done["forward"].outputs[name], task.target.example(batch)]
            return tuple(found)

        return {
            "forward": lambda done: (torch.zeros(batch, self.inputs),),
            "loss": pairs,
            "pool": lambda done: (done["forward"].outputs,),
        }

    def by_task(self, root: Component) -> dict[str, int]:
        """Parameters that an example uses where only one task is asked for."""
        mixture = self.mixture
        share = Fraction(mixture.chosen, mixture.num_experts)
        others = {task: set(self.tasks) - {task} for task in self.tasks}
        found = {}
        for task in self.tasks:
            used = Fraction(0)
            for name, component in root.walk():
                if any(name in (f"tower_{other}", f"gate_{other}") for other in others[task]):
                    continue
                for weight in component.weights.values():
                    expert = weight.role == "routed_experts"
                    used += weight.count * (share if expert else 1)
            found[task] = int(used)
        return found

    # Programs

    def forward(self, b: Builder, x: Any) -> Any:
        """Examples x [B, d] to an Output with every task's."""
        if b.spec.precision.compute_dtype != torch.float32:
            x = x.to(b.spec.precision.compute_dtype)
        records = b.no_items()
        gates: dict[str, Any] = {}
        if self.gates != "none":
            gate = Gate.model_validate(self.mixture.model_dump(exclude_unset=True))
            for name in self.tasks if self.gates == "task" else ("",):
                child = f"gate_{name}" if name else "gate"
                weights, record = b.child(child, gate, x, path=("mixture",), width=self.inputs)
                gates[name] = b.name(weights, child)
                records = records + (record,)  # noqa: RUF005  (a proxy)
        experts = Experts.model_validate(self.mixture.model_dump(exclude_unset=True))
        mixed = self._mixed(b, x, experts, gates)
        outputs = {}
        for index, (name, task) in enumerate(self.tasks.items()):
            tower = TaskTower(tower=self.tower, outputs=task.target.size)
            own = mixed[:, index] if self.gates == "task" else mixed
            facts: dict[str, Any] = {"path": ("tower",), "role": "head"}
            out = b.child(f"tower_{name}", tower, own, width=self.mixture.width, **facts)
            outputs[name] = b.name(out, name)
        losses = self._losses(b, records, len(gates))
        return b.record("Output", outputs=outputs, losses=losses, routing=records)

    def loss(self, b: Builder, **given: Any) -> Any:
        """The weighted sum of the tasks' mean losses, from outputs and targets of each."""
        total = None
        for name, task in self.tasks.items():
            outputs, target = given[f"{name}_output"].unsqueeze(1), given[f"{name}_target"]
            value = task.target.error(b, outputs, target).mean()
            value = value * task.weight if task.weight != 1.0 else value
            total = value if total is None else total + value
        return total

    def pool(self, b: Builder, outputs: Any) -> Any:
        """Predictions by task: values [B, n], or probabilities of yes or of classes."""
        return {name: task.target.prediction(outputs[name]) for name, task in self.tasks.items()}

    # Parts

    def _mixed(self, b: Builder, x: Any, experts: Experts, gates: dict[str, Any]) -> Any:
        """What towers are given: [B, T, n] where each task has a gate, else [B, n]."""
        facts: dict[str, Any] = {"path": ("mixture",), "width": self.inputs}
        if not gates:
            return b.child("experts", experts, x, **facts)[:, 0]
        with b.section("combine"):
            weights = torch.stack(tuple(gates.values()), 1)  # [B, T, E]
        if self.mixture.dense:
            outputs = b.child("experts", experts, x, **facts)
        else:
            shared = experts.model_copy(update={"tasks": len(gates)})
            outputs = b.child("experts", shared, x, weights, **facts)
        mixed = weights @ outputs
        return mixed if self.gates == "task" else mixed.squeeze(1)

    def _losses(self, b: Builder, records: Any, gates: int) -> dict[str, Any]:
        """Auxiliary losses, summed over gates."""
        losses: dict[str, Any] = {}
        on = b.spec.train.losses
        for name in self.mixture.losses:
            if on == "all" or name in on:
                for index in range(gates):
                    value = records[index].losses[name]
                    losses[name] = losses[name] + value if name in losses else value
        return losses


class Experts(MixtureLayer):
    """The experts that all tasks share; each runs once for an example, if any task chose it."""

    tasks: int = Field(1, ge=1, description="gates that choose among them")

    def describe(self, spec: Any) -> str:
        """`8 linear experts, shared by all tasks.`"""
        groups = listed([group.describe() for group in (self.experts, *self.others)], "and")
        return f"Experts that tasks share: {groups}."

    def programs(self) -> tuple[str, ...]:
        """Their outputs."""
        return ("forward",)

    def given(self) -> tuple[str, ...]:
        """Gates of all tasks, where they leave experts out."""
        return () if self.dense else ("weights",)

    def forward(self, b: Builder, x: Any, **given: Any) -> Any:
        """x [B, d] to outputs [B, E, n]; 0 for those that no task's weights [B, T, E] are for."""
        if self.dense:
            return self._all(b, x)
        made = []
        active = min(Fraction(1), Fraction(self.tasks * self.chosen, self.num_experts))
        for group, suffix, first in self._groups():
            own = given["weights"][..., first : first + group.count] if self.others else None
            wanted = chosen_by_any(given["weights"] if own is None else own)
            order, ends = sort_by_expert(wanted, group.count)
            rows = gather_rows(x, order)
            rows = self._outputs(b, group, rows, ends, suffix, active)
            made.append(torch.unflatten(ungroup_rows(rows, order), 0, (-1, group.count)))
        return torch.cat(made, 1) if len(made) > 1 else made[0]
