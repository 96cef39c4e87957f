"""Vision transformers: patches of an image, a stack of blocks, and a classifier on top."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field

from moegen.arch.attention import Attention
from moegen.arch.feed_forward import FeedForward
from moegen.arch.init import ZEROS
from moegen.arch.model import Model, RoutedLayer
from moegen.arch.moe import MoE
from moegen.arch.norm import LayerNorm, Norm
from moegen.arch.patches import Image, Pool, Positions, TokenPool
from moegen.arch.routing.ids import TOKEN
from moegen.arch.routing.router import Gates
from moegen.arch.stack import Stack, given_ids, known_ids, total_losses, unplaced_overrides
from moegen.errors import MoegenError, Problem
from moegen.graph.builder import Builder
from moegen.ops.images import class_loss
from moegen.spec.element import Element, OneOf, Path
from moegen.spec.words import counted


def unless(kind: str) -> Callable[[Any], Any]:
    """A part of this kind from a section that does not say one."""

    def said(value: Any) -> Any:
        return {"kind": kind, **value} if isinstance(value, dict) else value

    return said


class ClassHead(Element):
    """From an image's vector to the logits of its classes."""

    bias: bool = Field(True, description="whether the logits have a bias")
    representation: int | None = Field(
        None, ge=1, le=10**6, description="width of a layer with tanh before them (pre-logits)"
    )
    tasks: Gates | None = Field(
        None, description="a head for each id of a task, all with the same number of classes"
    )
    smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of a label that is spread over all classes"
    )

    def logits(self, b: Builder, x: Any, classes: int, tasks: Any) -> Any:
        """x [B, d] to [B, classes], by the head of each image's task [B] if there are several."""
        width = b.width
        if self.representation:
            width = self.representation
            weight = b.param("representation", width, b.width, role="head")
            added = b.param("representation_bias", width, init=ZEROS, role="head")
            x = torch.tanh(F.linear(x, weight, added))
        if self.tasks is None:
            weight = b.param("head", classes, width, role="head")
            added = b.param("head_bias", classes, init=ZEROS, role="head") if self.bias else None
            return F.linear(x, weight, added)
        count = self.tasks.count
        used: dict[str, Any] = {"role": "head", "active": Fraction(1, count)}
        weight = b.param("head", count, classes, width, **used)
        every = F.linear(x, weight.flatten(0, 1))
        own = torch.unflatten(every, -1, (count, classes))
        own = own.gather(1, tasks.view(-1, 1, 1).expand(-1, 1, classes)).squeeze(1)
        if self.bias:
            own = own + F.embedding(tasks, b.param("head_bias", count, classes, init=ZEROS, **used))
        return own


class Vision(Model):
    """A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) that classifies images."""

    runtime: ClassVar[str] = "ImageClassifier"
    unit: ClassVar[str] = "image"
    routed_unit: ClassVar[str] = "token"
    whole: ClassVar[str] = "image"
    records: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        "Output": (
            "What the model returns for training.",
            {
                "logits": "[B, classes]",
                "losses": "auxiliary, weighted: add them to the loss",
                "routing": "one record for each routed layer",
            },
        ),
    }

    kind: Literal["vision"] = "vision"
    image: Image = Field(description="the images, and how they are cut into patches")
    classes: int = Field(ge=1, le=10**8, description="number of labels")
    d_model: int = Field(ge=1, le=10**6, description="width of the residual stream")
    layers: int = Field(ge=1, le=2000, description="number of blocks")
    positions: Positions = Field(
        "learned", description="what tells patches their places: learned vectors, sines or nothing"
    )
    pool: Annotated[Pool, OneOf(Pool)] = Field(
        TokenPool(), description="how tokens become one vector"
    )
    norm: Annotated[Norm, OneOf(Norm), BeforeValidator(unless("layer"))] = Field(
        LayerNorm(), description="normalisation of blocks and before the pool; layer unless said"
    )
    attention: Annotated[Attention, OneOf(Attention), BeforeValidator(unless("bidirectional"))] = (
        Field(description="attention of every block; bidirectional unless its kind is said")
    )
    ffn: FeedForward | None = Field(None, description="network of the layers not routed")
    moe: MoE | None = Field(None, description="mixture of experts of the routed layers")
    residual_scale: float = Field(1.0, gt=0, le=1e3, description="factor on every branch")
    head: ClassHead = Field(ClassHead(), description="from an image's vector to logits")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What the parts need of the whole."""
        if self.attention.causal:
            kind = self.attention.kind
            sentence = f"{kind} attention is causal, but patches have no order; use bidirectional"
            yield ("attention", "kind"), sentence
        elif self.attention.rope:
            yield ("attention", "rope"), "patches have two coordinates, so no rope; use positions"
        yield from self.stack().rules()
        if self.positions == "sincos" and self.d_model % 4:
            sentence = f"sincos has four equal parts, so 4 must divide d_model ({self.d_model})"
            yield ("positions",), sentence
        for path, sentence in self.pool.check(self):
            yield ("pool", *path), sentence
        if self.moe is not None:
            yield from self._of_ids()
            yield from unplaced_overrides(self.moe, self.routed())

    def _of_ids(self) -> Iterator[tuple[Path, str]]:
        """An image has no token ids, and ids of one name are of one number."""
        tasks, told = self.head.tasks, set()
        for path, part in with_ids(self.routed()):
            name, count = getattr(part, "id", TOKEN), getattr(part, "count", None)
            if name == TOKEN and path not in told:
                told.add(path)
                yield path, "patches have no ids, so nothing can go by those of tokens"
            if tasks and name == tasks.id and isinstance(count, int) and count != tasks.count:
                sentence = f"there are {tasks.count} of id {name} here but {count} in"
                yield ("head", "tasks", "count"), f"{sentence} {'.'.join(map(str, path))}"
                return

    def programs(self) -> tuple[str, ...]:
        """Training, its loss, and the balance biases' update."""
        update = any(one.moe.router.balance_bias for one in self.routed())
        return ("forward", "loss", *(("update_balance",) if update else ()))

    def describe(self, spec: Any) -> str:
        """`Vision transformer of 12 layers, 6 of them routed; 768 wide, 197 tokens an image.`"""
        routed = len(self.routed())
        part = f", {routed} of them routed" if 0 < routed < self.layers else ""
        wide = f"{self.d_model} wide, {counted(self.tokens, 'token')} an image"
        return f"Vision transformer of {counted(self.layers, 'layer')}{part}; {wide}."

    # Facts

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.pool.before + self.image.side**2

    def given(self) -> tuple[str, ...]:
        """Names of the ids that a user gives beside images, each once."""
        tasks = (self.head.tasks.id,) if self.head.tasks else ()
        return tuple(dict.fromkeys((*given_ids(self.routed()), *tasks)))

    def stack(self) -> Stack:
        """The blocks."""
        return Stack(self, self.layers, self.attention, self.moe.placement if self.moe else None)

    def routed(self) -> list[RoutedLayer]:
        """Every routed layer, inserted ones counted."""
        return self.stack().routed()

    def depth(self, stack: str) -> int:
        """Layers of the one stack that it has."""
        return len(self.stack().blocks())

    # Workloads

    def length(self, asked: int | None) -> int:
        """The tokens of an image, which are no one's to choose."""
        if asked is not None:
            size, patch = self.image.size, self.image.patch
            sentence = f"an image of {size} x {size} in patches of {patch} x {patch} is always"
            hint = "leave out the sequence; -o model.image.size=... changes the image"
            tokens = counted(self.tokens, "token")
            raise MoegenError(Problem(f"{sentence} {tokens} here, not {asked:,}", hint=hint))
        return self.tokens

    def units(self, batch: int, sequence: int) -> int:
        """Images."""
        return batch

    def workload(self, batch: int, sequence: int) -> str:
        """`8 images of 197 tokens`."""
        return f"{counted(batch, 'image')} of {counted(sequence, 'token')}"

    def remarks(self) -> Iterator[str]:
        """What an image is made of."""
        side = self.image.side
        more = f" and {self.pool.words}" if self.pool.words else ""
        patches = f"{side} x {side} patches{more}"
        yield f"An image is {counted(self.tokens, 'token')}: {patches}."

    def examples(self, batch: Any, sequence: Any, new: int = 1) -> dict[str, Any]:
        """Inputs of each program, in the order to run them; a function of results so far."""
        image = self.image

        def ids() -> Any:
            return torch.zeros((batch,), dtype=torch.int64)

        def images() -> Any:
            return torch.zeros((batch, image.channels, image.size, image.size))

        return {
            "forward": lambda done: (images(), *(ids() for _ in self.given())),
            "loss": lambda done: (done["forward"].logits, ids()),
            "update_balance": lambda done: (done["forward"].routing,),
        }

    # Programs

    def forward(self, b: Builder, images: Any, **given: Any) -> Any:
        """Images [B, channels, height, width] to an Output."""
        x = self.image.embedded(b, images, self.d_model)
        x = b.inline(self.pool, "begun", x, path=("model", "pool"))
        x = self.image.placed(b, x, self.positions, self.pool.before)
        fields: dict[str, Any] = {}
        if self.moe:
            tokens = x.shape[0] * x.shape[1]
            valid = torch.ones(tokens, dtype=torch.bool, device=x.device)
            fields = {"valid": valid, **known_ids(b, self.routed(), x, given)}
        context = b.record("Context", **fields)
        if not self.moe:
            for layer, block in enumerate(self.stack().blocks()):
                x = b.child(f"layers.{layer}", block, x, context)
            return b.record("Output", logits=self._logits(b, x, given))
        routing = b.no_items()
        for layer, block in enumerate(self.stack().blocks()):
            x, records = b.child(f"layers.{layer}", block, x, context)
            routing = routing + records
        logits = self._logits(b, x, given)
        losses = total_losses(b, self.moe, routing)
        return b.record("Output", logits=logits, losses=losses, routing=routing)

    def loss(self, b: Builder, logits: Any, labels: Any) -> Any:
        """Mean cross-entropy of logits [B, classes] at labels [B]."""
        smoothing = {"smoothing": self.head.smoothing} if self.head.smoothing else {}
        return class_loss(logits, labels, **smoothing)

    def update_balance(self, b: Builder, routing: Any) -> Any:
        """Move the routers' balance biases by the loads of a step's Output.routing."""
        blocks = self.stack().blocks()
        for index, one in enumerate(self.routed()):
            if one.moe.router.balance_bias:
                b.child(one.site, blocks[one.layer], routing[index].load)

    # Parts

    def _logits(self, b: Builder, x: Any, given: dict[str, Any]) -> Any:
        x = b.inline(self.norm, "apply", "norm", x, self.d_model, path=("norm",))
        pooled = b.inline(self.pool, "pooled", x, path=("pool",))
        tasks = given[self.head.tasks.id] if self.head.tasks else None
        logits = b.inline(self.head, "logits", pooled, self.classes, tasks, path=("head",))
        return logits


def with_ids(routed: list[RoutedLayer]) -> Iterator[tuple[Path, Any]]:
    """The parts of routed layers that go by ids, each with its path below the model."""
    for one in routed:
        router, place = one.moe.router, one.path[1:]
        for name in ("input", "score", "restrict"):
            part = getattr(router, name)
            if part is not None and part.ids():
                yield (*place, "router", name), part
        if router.gates:
            yield (*place, "router", "gates"), router.gates
        for name, loss in one.moe.losses.items():
            if loss.ids():
                yield (*place, "losses", name), loss
