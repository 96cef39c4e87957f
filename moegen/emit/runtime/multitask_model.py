"""What a multi-task model can do beside its network: train on all tasks, and predict each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .network import Network


class MultitaskModel(Network):
    """Base of a model that has `forward`, `loss` and `pool`."""

    def loss(self, *inputs: Any, **named: Any) -> Tensor:
        """The weighted sum of the tasks' losses, from outputs and targets of each."""
        raise NotImplementedError

    def pool(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predictions of the tasks' outputs, by task."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Any:
        """Examples x [B, d] to an Output."""
        return super().__call__(x)

    def training_loss(
        self, x: Tensor, labels: Mapping[str, Tensor]
    ) -> tuple[Tensor, Any]:
        """The loss of every task's labels for examples x, and the Output itself."""
        output = self(x)
        if labels.keys() != output.outputs.keys():
            wanted, given = sorted(output.outputs), sorted(labels)
            raise ValueError(f"labels are needed for {wanted}, not for {given}")
        pairs = [(made, labels[task]) for task, made in output.outputs.items()]
        loss = self.loss(*(value for pair in pairs for value in pair))
        return self.total_loss(loss, output), output

    @torch.no_grad()
    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """By task: values [B, n], or probabilities of yes [B, 1] or of each class [B, C]."""
        return self.pool(self(x).outputs)
