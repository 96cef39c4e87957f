"""Images and texts through one stack of blocks, compared by the vectors that come out (LIMoE)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field

from moegen.arch.attention import Attention
from moegen.arch.feed_forward import FeedForward
from moegen.arch.model import Model, RoutedLayer
from moegen.arch.moe import MoE
from moegen.arch.norm import LayerNorm, Norm
from moegen.arch.patches import Image
from moegen.arch.routing.ids import TOKEN
from moegen.arch.stack import Stack, given_ids, known_ids, total_losses, unplaced_overrides
from moegen.arch.vision import unless, with_ids
from moegen.errors import MoegenError, Problem
from moegen.graph.builder import Builder
from moegen.graph.component import Init
from moegen.ops.contrast import contrastive_loss, unit_vectors
from moegen.ops.losses import real_tokens
from moegen.spec.element import Element, OneOf, Path
from moegen.spec.words import counted

MODALITY = "modality"  # 0 for tokens of images, 1 for those of texts


class Projections(Element):
    """From the mean of each side's tokens to vectors that are compared."""

    shorthand = "width"

    width: int = Field(ge=1, le=10**6, description="width of the vectors", examples=[512])
    temperature: float = Field(
        0.07, gt=0, le=1e3, description="what similarities are divided by at first; learned"
    )
    largest: float = Field(
        100.0, gt=0, le=1e6, description="bound of what similarities are multiplied by"
    )


class TwoTower(Model):
    """One tower for images and texts (LIMoE: Mustafa et al. 2022, arXiv:2206.02770).

    Attention is within an image and within a text; routers and experts see all tokens of both.
    """

    runtime: ClassVar[str] = "ContrastiveModel"
    unit: ClassVar[str] = "pair"
    routed_unit: ClassVar[str] = "token"
    counted_by: ClassVar[tuple[str, int] | None] = (MODALITY, 2)
    records: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        "Output": (
            "What the model returns for training.",
            {
                "logits": "[B, B], images by texts: similarities times a learned factor",
                "images": "[B, w], of length 1",
                "texts": "[B, w], of length 1",
                "losses": "auxiliary, weighted: add them to the loss",
                "routing": "one record for each routed layer",
            },
        ),
        "Context": (
            "What every layer needs beside the residual stream.",
            {
                "bias": "[B, 1, 1, T], minus infinity at padding of texts",
                "valid": "[B * S], False at padding",
                MODALITY: "[B * S], 0 for tokens of images and 1 for those of texts",
            },
        ),
    }

    kind: Literal["two_tower"] = "two_tower"
    image: Image = Field(description="the images, and how they are cut into patches")
    vocab_size: int = Field(ge=1, le=10**8, description="number of token ids of texts")
    max_sequence: int = Field(ge=1, le=10**6, description="longest text, tokens")
    d_model: int = Field(ge=1, le=10**6, description="width of the residual stream")
    layers: int = Field(ge=1, le=2000, description="number of blocks")
    norm: Annotated[Norm, OneOf(Norm), BeforeValidator(unless("layer"))] = Field(
        LayerNorm(), description="normalisation of blocks and after them; layer unless said"
    )
    attention: Annotated[Attention, OneOf(Attention), BeforeValidator(unless("bidirectional"))] = (
        Field(description="attention of every block; bidirectional unless its kind is said")
    )
    ffn: FeedForward | None = Field(None, description="network of the layers not routed")
    moe: MoE | None = Field(None, description="mixture of experts of the routed layers")
    residual_scale: float = Field(1.0, gt=0, le=1e3, description="factor on every branch")
    head: Projections = Field(description="from tokens to vectors that are compared")

    def rules(self) -> Iterator[tuple[Path, str]]:
        """What the parts need of the whole."""
        if self.attention.causal:
            kind = self.attention.kind
            sentence = f"{kind} attention is causal, but patches have no order; use bidirectional"
            yield ("attention", "kind"), sentence
        elif self.attention.rope:
            yield ("attention", "rope"), "patches have two coordinates, so there is no rope here"
        yield from self.stack().rules()
        if self.moe is None:
            return
        for path, part in with_ids(self.routed()):
            if getattr(part, "id", TOKEN) == TOKEN:
                yield path, "patches have no ids, so nothing can go by those of tokens"
        yield from unplaced_overrides(self.moe, self.routed())

    def programs(self) -> tuple[str, ...]:
        """Training, its loss, and the balance biases' update."""
        update = any(one.moe.router.balance_bias for one in self.routed())
        return ("forward", "loss", *(("update_balance",) if update else ()))

    def describe(self, spec: Any) -> str:
        """`One tower of 12 layers for images and texts, 6 of them routed; 768 wide.`"""
        routed = len(self.routed())
        part = f", {routed} of them routed" if 0 < routed < self.layers else ""
        layers = counted(self.layers, "layer")
        return f"One tower of {layers} for images and texts{part}; {self.d_model} wide."

    # Facts

    @property
    def patches(self) -> int:
        """Tokens of an image."""
        return self.image.side**2

    def given(self) -> tuple[str, ...]:
        """Names of the ids that a user gives; the modality is known."""
        return tuple(name for name in given_ids(self.routed()) if name != MODALITY)

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
        """Tokens of a text: as many as there can be, unless fewer are asked for."""
        if asked is not None and asked > self.max_sequence:
            sentence = f"a text has at most {counted(self.max_sequence, 'token')}, not {asked:,}"
            raise MoegenError(Problem(sentence, hint="model.max_sequence says how many"))
        return asked or self.max_sequence

    def seen(self, stack: str, sequence: int) -> int:
        """Patches of an image and tokens of its text."""
        return self.patches + sequence

    def units(self, batch: int, sequence: int) -> int:
        """Pairs."""
        return batch

    def workload(self, batch: int, sequence: int) -> str:
        """`8 pairs of 49 patches and 16 tokens of text`."""
        patches = counted(self.patches, "patch", "patches")
        return f"{counted(batch, 'pair')} of {patches} and {counted(sequence, 'token')} of text"

    def examples(self, batch: Any, sequence: Any, new: int = 1) -> dict[str, Any]:
        """Inputs of each program, in the order to run them; a function of results so far."""
        image = self.image

        def ids(*shape: Any) -> Any:
            return torch.zeros(shape, dtype=torch.int64)

        def images() -> Any:
            return torch.zeros((batch, image.channels, image.size, image.size))

        return {
            "forward": lambda done: (
                images(),
                ids(batch, sequence),
                None,
                *(ids(batch) for _ in self.given()),
            ),
            "loss": lambda done: (done["forward"].logits,),
            "update_balance": lambda done: (done["forward"].routing,),
        }

    # Programs

    def forward(self, b: Builder, images: Any, ids: Any, mask: Any = None, **given: Any) -> Any:
        """Images [B, channels, height, width], ids [B, T] and mask [B, T] to an Output."""
        x = self._embed(b, images, ids)
        real = real_tokens(ids, mask).view(ids.shape[0], -1)
        # Added to logits; made once, since torch would make it of booleans in every layer.
        bias = torch.where(real, 0.0, float("-inf")).unsqueeze(1).unsqueeze(1)
        dtype = b.spec.precision.compute_dtype
        fields: dict[str, Any] = {"bias": bias if dtype == torch.float32 else bias.to(dtype)}
        if self.moe:
            fields |= self._of_tokens(b, x, real, given)
        context = b.record("Context", **fields)
        routing = b.no_items() if self.moe else None
        for layer, block in enumerate(self.stack().blocks()):
            out = b.child(f"layers.{layer}", block, x, context)
            if self.moe:
                x, records = out
                routing = routing + records
            else:
                x = out
        fields = self._compared(b, x, real)
        if self.moe:
            fields |= {"losses": total_losses(b, self.moe, routing), "routing": routing}
        return b.record("Output", **fields)

    def loss(self, b: Builder, logits: Any) -> Any:
        """InfoNCE of logits [B, B], row i and column i being a pair."""
        return contrastive_loss(logits)

    def update_balance(self, b: Builder, routing: Any) -> Any:
        """Move the routers' balance biases by the loads of a step's Output.routing."""
        blocks = self.stack().blocks()
        for index, one in enumerate(self.routed()):
            if one.moe.router.balance_bias:
                b.child(one.site, blocks[one.layer], routing[index].load)

    def attend(self, q: Any, k: Any, v: Any, context: Any, **options: Any) -> Any:
        """Patches see patches of their image, tokens of a text the real ones of theirs."""
        n = self.patches
        images = F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], **options)
        texts = F.scaled_dot_product_attention(
            q[:, :, n:], k[:, :, n:], v[:, :, n:], attn_mask=context.bias, **options
        )
        return torch.cat((images, texts), 2)

    # Parts

    def _embed(self, b: Builder, images: Any, ids: Any) -> Any:
        """Tokens of images, then those of texts, [B, S, d], each with its place."""
        patches = self.image.embedded(b, images, self.d_model)
        patches = self.image.placed(b, patches, "learned", 0)
        table = b.param("embedding", self.vocab_size, self.d_model, role="embedding")
        places = b.param("text_positions", self.max_sequence, self.d_model, role="embedding")
        positions = torch.arange(ids.shape[1], device=ids.device)
        words = F.embedding(ids, table) + F.embedding(positions, places)
        return torch.cat((patches, words), 1)

    def _of_tokens(self, b: Builder, x: Any, real: Any, given: dict[str, Any]) -> dict[str, Any]:
        """What routers and their losses are told of tokens, [B * S] each."""
        seen = torch.ones((x.shape[0], self.patches), dtype=torch.bool, device=x.device)
        valid = torch.cat((seen, real), 1).flatten()
        of_texts = torch.arange(x.shape[1], device=x.device) >= self.patches
        modality = of_texts.long().expand(x.shape[0], -1)
        known = known_ids(b, self.routed(), x, {**given, MODALITY: modality})
        return {"valid": valid, **known}

    def _compared(self, b: Builder, x: Any, real: Any) -> dict[str, Any]:
        """Both sides as vectors, and how alike they are."""
        x = b.inline(self.norm, "apply", "norm", x, self.d_model, path=("norm",))
        width = self.head.width
        mean = x[:, : self.patches].mean(1)
        shares = real.unsqueeze(-1).to(x.dtype)
        sums = (x[:, self.patches :] * shares).sum(1)
        said = sums / shares.sum(1).clamp(min=1)
        to_images = b.param("image_head", width, self.d_model, role="head")
        to_texts = b.param("text_head", width, self.d_model, role="head")
        images = unit_vectors(F.linear(mean, to_images))
        texts = unit_vectors(F.linear(said, to_texts))
        begin = Init("constant_", (("val", -math.log(self.head.temperature)),))
        factor = b.param("temperature", 1, dtype=torch.float32, init=begin, role="head").exp()
        factor = factor.clamp(max=self.head.largest)
        logits = images @ texts.transpose(0, 1) * factor
        return {"logits": logits, "images": images, "texts": texts}
