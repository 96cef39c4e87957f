"""What a model that classifies images can do beside its network: train and predict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .network import Network


class ImageClassifier(Network):
    """Base of a model that has `forward` and `loss`."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of logits [B, C] at labels [B]; label -100 is left out."""
        raise NotImplementedError

    def __call__(self, images: Tensor, **given: Tensor) -> Any:
        """Images [B, channels, height, width] to an Output.

        given: ids of images, such as of their tasks, [B] each, if the model reads any.
        """
        return super().__call__(images, **given)

    def training_loss(
        self, images: Tensor, labels: Tensor, **given: Tensor
    ) -> tuple[Tensor, Any]:
        """Loss at labels [B] plus the auxiliary losses, and the Output itself."""
        output = self(images, **given)
        return self.total_loss(self.loss(output.logits, labels), output), output

    @torch.no_grad()
    def probabilities(self, images: Tensor, **given: Tensor) -> Tensor:
        """Probability of each class, [B, C], in fp32."""
        logits: Tensor = self(images, **given).logits
        return logits.float().softmax(-1)

    @torch.no_grad()
    def predict(self, images: Tensor, **given: Tensor) -> Tensor:
        """The likeliest class of each image, [B]."""
        logits: Tensor = self(images, **given).logits
        return logits.argmax(-1)
