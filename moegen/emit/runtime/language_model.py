"""What a language model can do beside its network: train and generate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .network import Network, sample


class LanguageModel(Network):
    """Base of a model that has `forward`, `loss`, `step` and `new_cache`."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the next token; label -100 is left out."""
        raise NotImplementedError

    def step(self, *inputs: Any, **given: Any) -> Tensor:
        """Logits of ids [B, T] at positions start, start + 1, ...; fills the cache."""
        raise NotImplementedError

    def new_cache(self, batch: int, length: int) -> Any:
        """An empty cache."""
        raise NotImplementedError

    def __call__(self, ids: Tensor, mask: Tensor | None = None, **given: Tensor) -> Any:
        """ids [B, S] and mask [B, S] of real tokens (padding on the right) to an Output.

        given: ids that the routers read beside tokens, [B] or [B, S] each, if there are any.
        """
        return super().__call__(ids, mask, **given)

    def training_loss(
        self, ids: Tensor, mask: Tensor | None = None, **given: Tensor
    ) -> tuple[Tensor, Any]:
        """Next-token loss of ids [B, S] plus the auxiliary losses, and the Output itself."""
        output = self(ids, mask, **given)
        labels = ids if mask is None else ids.masked_fill(~mask.bool(), -100)
        return self.total_loss(self.loss(output[0], labels), output), output

    @torch.no_grad()
    def stream(
        self,
        ids: Tensor,
        new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        **given: Tensor,
    ) -> Iterator[Tensor]:
        """Yield new_tokens tokens [B] after the prompts ids [B, S], one step at a time.

        temperature 0 takes the likeliest token, else samples, among the top_k likeliest if set;
        given: ids [B] that routers read beside tokens.
        """
        cache = self.new_cache(ids.shape[0], ids.shape[1] + new_tokens)
        start = torch.zeros((), dtype=torch.int64, device=ids.device)
        for _ in range(new_tokens):
            logits = self.step(ids, start, cache, **given)[:, -1]
            start = start + ids.shape[1]
            ids = sample(logits, temperature, top_k).unsqueeze(-1)
            yield ids[:, 0]

    def generate(
        self,
        ids: Tensor,
        new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        **given: Tensor,
    ) -> Tensor:
        """The prompts ids [B, S] with new_tokens more tokens, [B, S + new_tokens]."""
        new = list(self.stream(ids, new_tokens, temperature, top_k, **given))
        return torch.cat([ids, *(token.unsqueeze(-1) for token in new)], dim=1)
