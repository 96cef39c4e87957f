"""What a model that reads one sequence and writes another can do: train and generate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .network import Network, sample


class SequenceToSequence(Network):
    """Base of a model that has `forward`, `loss`, `encode`, `new_cache`, `step`, `shifted`.

    Padding is on the right of sources and of targets.
    """

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of logits at labels; label -100 is left out."""
        raise NotImplementedError

    def shifted(self, labels: Tensor) -> Tensor:
        """What the decoder reads to write labels."""
        raise NotImplementedError

    def encode(self, *inputs: Any, **given: Any) -> Tensor:
        """What the encoder makes of ids [B, S] with mask [B, S]: [B, S, d]."""
        raise NotImplementedError

    def new_cache(self, memory: Tensor, length: int, mask: Tensor | None = None) -> Any:
        """A cache with the source's keys and values, and none of a target yet."""
        raise NotImplementedError

    def step(self, *inputs: Any, **given: Any) -> Tensor:
        """Logits of ids [B, T] at positions start, start + 1, ...; fills the cache."""
        raise NotImplementedError

    def __call__(
        self,
        ids: Tensor,
        decoder_ids: Tensor,
        mask: Tensor | None = None,
        decoder_mask: Tensor | None = None,
        **given: Tensor,
    ) -> Any:
        """Source ids [B, S] and target ids [B, T] to an Output with logits [B, T, V].

        mask [B, S] and decoder_mask [B, T]: real tokens, all unless given;
        given: ids [B] that the routers read beside tokens, if there are any.
        """
        return super().__call__(ids, decoder_ids, mask, decoder_mask, **given)

    def training_loss(
        self,
        ids: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        **given: Tensor,
    ) -> tuple[Tensor, Any]:
        """Loss of writing labels [B, T] for ids [B, S] plus auxiliary losses, and the Output.

        labels are -100 at padding. The decoder reads them shifted behind the start token.
        """
        real = labels != -100
        output = self(ids, self.shifted(labels), mask, real, **given)
        return self.total_loss(self.loss(output.logits, labels), output), output

    @torch.no_grad()
    def stream(
        self,
        ids: Tensor,
        new_tokens: int,
        mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        **given: Tensor,
    ) -> Iterator[Tensor]:
        """Yield new_tokens tokens [B] for the sources ids [B, S], one step at a time.

        temperature 0 takes the likeliest token, else samples, among the top_k likeliest if set;
        given: ids [B] that routers read beside tokens.
        """
        memory = self.encode(ids, mask, **given)
        cache = self.new_cache(memory, new_tokens, mask)
        start = torch.zeros((), dtype=torch.int64, device=ids.device)
        token = self.shifted(ids[:, :1])
        for _ in range(new_tokens):
            logits = self.step(token, start, cache, **given)[:, -1]
            start = start + 1
            token = sample(logits, temperature, top_k).unsqueeze(-1)
            yield token[:, 0]

    def generate(
        self,
        ids: Tensor,
        new_tokens: int,
        mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        end: int | None = None,
        **given: Tensor,
    ) -> Tensor:
        """new_tokens tokens [B, new_tokens] for the sources ids [B, S].

        end: a token after which a sequence repeats it; fewer tokens if all have come to it.
        """
        new: list[Tensor] = []
        done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for token in self.stream(ids, new_tokens, mask, temperature, top_k, **given):
            if end is not None:
                token = token.masked_fill(done, end)
                done = done | (token == end)
            new.append(token)
            if end is not None and bool(done.all()):
                break
        return torch.stack(new, dim=1)
