"""Mixtures that are the whole model: of functions and classifiers on vectors, stacked or alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from moegen.arch.init import ZEROS
from moegen.arch.mixture.layer import MixtureLayer
from moegen.arch.mixture.targets import Target, no_length
from moegen.arch.model import Model
from moegen.graph.builder import Builder
from moegen.ops.mixtures import draw_expert, log_gates, take_expert, vote
from moegen.spec.element import Element, OneOf, Path
from moegen.spec.words import counted


class VectorHead(Element):
    """A linear map from the last layer's output to the target's."""

    bias: bool = Field(True, description="whether it has a bias")


class Mixture(Model):
    """Function approximation or classification by mixtures of experts on vectors.

    Without a head the last layer's experts each predict the target, and the loss says how they
    share it; with one, layers are hidden ones.
    """

    runtime: ClassVar[str] = "MixtureModel"
    unit: ClassVar[str] = "example"
    records: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        "Output": (
            "What the model returns for training.",
            {
                "outputs": "[B, E, n] of every expert, or [B, n] where they are mixed",
                "gates": "[B, E]",
                "losses": "auxiliary, weighted: add them to the loss",
                "routing": "one record for each layer",
            },
        ),
        "Routing": (
            "What a mixture did with the examples of a batch.",
            {
                "load": "[E], examples that chose each expert, or whose best one it is",
                "dropped": "[], 0: nothing is refused",
                "probability": "[E], mean score of each expert",
                "entropy": "[], of the scores, mean over examples, in nats",
                "losses": "this layer's own, weighted",
            },
        ),
    }

    kind: Literal["mixture"] = "mixture"
    inputs: int = Field(ge=1, le=10**7, description="numbers of an example, or of each patch")
    target: Annotated[Target, OneOf(Target)] = Field(
        description="what is predicted: values, binary, or classes"
    )
    layers: tuple[MixtureLayer, ...] = Field(
        min_length=1, max_length=1000, description="mixtures, one after the other"
    )
    head: VectorHead | None = Field(
        None, description="a linear map after the last layer; none: its experts predict"
    )
    objective: Literal["cooperative", "competitive", "mixture"] = Field(
        "cooperative",
        description="Jacobs et al. 1991: of the blended output; of each expert's, weighted by "
        "gates; or the negative log-likelihood of the mixture",
    )
    pooling: Literal["weighted", "average", "vote", "winner", "sample"] = Field(
        "weighted",
        description="how experts' predictions become one: by gates, their mean, a majority vote, "
        "that of the highest gate, or of one drawn by gates",
    )

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What layers need of each other, and the loss of the last one."""
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            if layer.width is None and (index < last or self.head):
                yield ("layers", index), "width is missing: how many numbers it gives"
            if index and layer.patches:
                yield ("layers", index, "patches"), "only the first layer sees patches"
        end, size = self.layers[last], self.target.size
        if self.head is None and end.width not in (None, size):
            sentence = f"width is {end.width}, but without a head experts give the target's {size}"
            yield ("layers", last, "width"), sentence
        signed = any(group.signs for group in (end.experts, *end.others))
        if self.head is None and signed and size != 1:
            sentence = f"signs give 1 number, but the target has {size}"
            yield ("layers", last, "experts", "signs"), sentence
        for name, usual in (("objective", "cooperative"), ("pooling", "weighted")):
            if getattr(self, name) != usual and not self.apart:
                why = "there is a head" if self.head else "the last layer's select is not all"
                said = f"{name} {getattr(self, name)}"
                yield (name,), f"{said} needs each expert's prediction, but {why}"
        if self.pooling == "vote" and self.target.kind != "classes":
            yield ("pooling",), f"a vote is about classes, not about {self.target.noun}"

    def describe(self, spec: Any) -> str:
        """`Mixture on 2 numbers; 1 layer, classes.`"""
        layers = counted(len(self.layers), "layer")
        loss = f"{self.objective} loss" if self.apart else "loss of the output"
        return f"Mixture model of {layers} on vectors of {self.inputs}; {self.target.noun}, {loss}."

    # Facts

    @property
    def apart(self) -> bool:
        """Whether each expert's prediction is known: the last layer is dense, and no head."""
        return self.head is None and self.layers[-1].dense

    def depth(self, stack: str) -> int:
        """How many layers there are."""
        return len(self.layers)

    def given(self) -> tuple[str, ...]:
        """Beside outputs, the gates where experts are apart."""
        return ("gates",) if self.apart else ()

    def programs(self) -> tuple[str, ...]:
        """Training, its loss, and what is asked of a trained mixture."""
        posterior = ("log_density", "posteriors") if self.apart else ()
        return ("forward", "loss", *posterior, "pool", "likelihood")

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
        patches = self.layers[0].patches
        shape = (batch, patches, self.inputs) if patches else (batch, self.inputs)

        def found(done: Any) -> tuple[Any, ...]:
            out = done["forward"]
            return (out.outputs, out.gates) if self.apart else (out.outputs,)

        def told(done: Any) -> tuple[Any, ...]:
            outputs, *gates = found(done)
            return outputs, self.target.example(batch), *gates

        return {
            "forward": lambda done: (torch.zeros(shape),),
            "loss": told,
            "log_density": lambda done: told(done)[:2],
            "posteriors": told,
            "likelihood": told,
            "pool": found,
        }

    # Programs

    def forward(self, b: Builder, x: Any) -> Any:
        """Examples x [B, d], or of patches [B, P, d], to an Output."""
        if b.spec.precision.compute_dtype != torch.float32:
            x = x.to(b.spec.precision.compute_dtype)
        routing, width = b.no_items(), self.inputs
        apart: tuple[Any, ...] = ()
        for index, layer in enumerate(self.layers):
            end = index == len(self.layers) - 1
            made = resolved(layer, self.target.size)
            name, path = f"layers.{index}", ("layers", index)
            if end and self.apart:
                x, gates, record = b.child(name, made, x, path=path, width=width, program="apart")
                apart = (gates,)
            else:
                x, record = b.child(name, made, x, path=path, width=width)
            routing = routing + (record,)  # noqa: RUF005  (a proxy)
            width = made.width or width
        if self.head:
            x = self._headed(b, x, width)
        return self._output(b, x, apart, routing)

    def loss(self, b: Builder, outputs: Any, target: Any, **given: Any) -> Any:
        """The mean loss of outputs and targets, as the spec names it."""
        if not self.apart:
            return self.target.error(b, outputs.unsqueeze(1), target).mean()
        gates = given["gates"]
        if self.objective == "cooperative":
            blend = gates.unsqueeze(1) @ outputs
            return self.target.error(b, blend, target).mean()
        if self.objective == "competitive":
            return (gates * self.target.error(b, outputs, target)).sum(-1).mean()
        density = self.target.log_density(b, outputs, target)
        return -torch.logsumexp(log_gates(gates) + density, -1).mean()

    def log_density(self, b: Builder, outputs: Any, target: Any) -> Any:
        """ln P(target) given each expert [B, E], but for a constant."""
        return self.target.log_density(b, outputs, target)

    def posteriors(self, b: Builder, outputs: Any, target: Any, **given: Any) -> Any:
        """How likely each expert made the target [B, E]: gates times densities, over their sum."""
        density = self.target.log_density(b, outputs, target)
        return (log_gates(given["gates"]) + density).softmax(-1)

    def likelihood(self, b: Builder, outputs: Any, target: Any, **given: Any) -> Any:
        """The log-likelihood of each target [B]; of the mixture, where experts are apart."""
        if self.apart and self.objective != "cooperative":
            density = self.target.log_density(b, outputs, target)
            value = torch.logsumexp(log_gates(given["gates"]) + density, -1)
        else:
            blend = given["gates"].unsqueeze(1) @ outputs if self.apart else outputs.unsqueeze(1)
            value = self.target.log_density(b, blend, target).squeeze(1)
        return value + self.target.constant() if self.target.constant() else value

    def pool(self, b: Builder, outputs: Any, **given: Any) -> Any:
        """The prediction: values [B, n], or probabilities of yes or of classes."""
        if not self.apart:
            return self.target.prediction(outputs)
        gates = given["gates"]
        if self.pooling == "weighted" and self.objective == "cooperative":
            return self.target.prediction((gates.unsqueeze(1) @ outputs).squeeze(1))
        predictions = self.target.prediction(outputs)
        if self.pooling == "weighted":
            return (gates.unsqueeze(1) @ predictions).squeeze(1)
        if self.pooling == "average":
            return predictions.mean(1)
        if self.pooling == "vote":
            return vote(predictions)
        best = gates.argmax(-1, keepdim=True) if self.pooling == "winner" else draw_expert(gates)
        return take_expert(predictions, best)

    # Parts

    def _headed(self, b: Builder, x: Any, width: Any) -> Any:
        assert self.head is not None
        size = self.target.size
        bias = b.param("head_bias", size, init=ZEROS, role="head") if self.head.bias else None
        return F.linear(x, b.param("head", size, width, role="head"), bias)

    def _output(self, b: Builder, x: Any, apart: tuple[Any, ...], routing: Any) -> Any:
        gates = {"gates": apart[0]} if apart else {}
        losses: dict[str, Any] = {}
        on = b.spec.train.losses
        for index, layer in enumerate(self.layers):
            for name in layer.loss_names(on):
                value = routing[index].losses[name]
                losses[name] = losses[name] + value if name in losses else value
        return b.record("Output", outputs=x, **gates, losses=losses, routing=routing)


def resolved(layer: MixtureLayer, width: int) -> MixtureLayer:
    """A layer whose output width is known."""
    return layer if layer.width else layer.model_copy(update={"width": width})
