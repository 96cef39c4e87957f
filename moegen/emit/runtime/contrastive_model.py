"""What a model that compares images and texts can do: train, and say how alike they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .network import Network


class ContrastiveModel(Network):
    """Base of a model that has `forward` and `loss`."""

    def loss(self, logits: Tensor) -> Tensor:
        """InfoNCE of logits [B, B], row i and column i being a pair."""
        raise NotImplementedError

    def __call__(
        self, images: Tensor, ids: Tensor, mask: Tensor | None = None, **given: Tensor
    ) -> Any:
        """Images [B, channels, height, width] and their texts' ids [B, T] to an Output.

        mask [B, T]: the real tokens of texts, one at least in each.
        """
        return super().__call__(images, ids, mask, **given)

    def training_loss(
        self, images: Tensor, ids: Tensor, mask: Tensor | None = None, **given: Tensor
    ) -> tuple[Tensor, Any]:
        """Contrastive loss of a batch of pairs plus the auxiliary losses, and the Output itself."""
        output = self(images, ids, mask, **given)
        return self.total_loss(self.loss(output.logits), output), output

    @torch.no_grad()
    def similarity(
        self, images: Tensor, ids: Tensor, mask: Tensor | None = None, **given: Tensor
    ) -> Tensor:
        """Cosines of all images and texts of a batch, [B, B]."""
        output = self(images, ids, mask, **given)
        cosines: Tensor = output.images @ output.texts.T
        return cosines
