"""What any emitted model can do beside its network: save, load, checkpoint, statistics."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_LAYER = re.compile(r"((?:.+\.)?)layers\.(\d+)")


class Part:
    """Parameters of one purpose, and factors on what an optimizer is given for them.

    names: of parameters, or of modules, which stand for all below; * is any layer's number.
    """

    def __init__(
        self, name: str, *names: str, lr: float = 1.0, weight_decay: float = 1.0
    ) -> None:
        """Parameters of some names are for what `name` says."""
        self.name = name
        self.lr = lr
        self.weight_decay = weight_decay
        patterns = (re.escape(n).replace(r"\*", r"\d+") for n in names)
        self._held = re.compile(rf"(?:{'|'.join(patterns)})(?:\..+)?")

    def holds(self, parameter: str) -> bool:
        """Whether a parameter of this dotted name is one of these."""
        return self._held.fullmatch(parameter) is not None


class Network(nn.Module):
    """Base of every model."""

    parts: ClassVar[tuple[Part, ...]] = ()

    @staticmethod
    def total_loss(loss: Tensor, output: Any) -> Tensor:
        """A loss plus the auxiliary losses of an Output, if it has any."""
        for value in getattr(output, "losses", {}).values():
            loss = loss + value
        return loss

    def checkpoint_layers(self, every: int = 1) -> None:
        """Recompute every so many layers in the backward pass instead of keeping them."""
        for stack in _stacks(self):
            for layer in list(stack)[::every]:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def save(self, path: str | Path) -> None:
        """Write parameters and persistent buffers to a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        target = Path(path)
        partial_file = target.with_name(f"{target.name}.partial")
        try:
            save_file(
                {k: v.contiguous() for k, v in self.state_dict().items()}, partial_file
            )
            partial_file.replace(target)
        finally:
            partial_file.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """A model with the parameters of a safetensors file; any name amiss is an error."""
        from safetensors.torch import load_file

        with torch.device("meta"):
            model = cls()
        model.to_empty(device=device)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        model.load_state_dict(load_file(path, device=str(device)), strict=True)
        return model

    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def parameter_groups(
        self, lr: float, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Groups of parameters for an optimizer of torch.optim, each with its own rates.

        Frozen parameters are in none. "name" is the part: a part has two groups where
        weight decay is for its matrices alone.
        """
        trained = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        groups = [
            {
                "name": part.name,
                "params": [p for name, p in trained if part.holds(name)],
                "lr": lr * part.lr,
                "weight_decay": weight_decay * part.weight_decay,
            }
            for part in self.parts
        ]
        return [group for group in groups if group["params"]]

    def routed_layers(self) -> list[int | str]:
        """The layers that are routed, counted from 0, in the order of Output's routing.

        A layer of a stack of its own, such as an encoder's, has that before its number.
        """
        names = (n for n, m in self.named_modules() if hasattr(m, "moe"))
        return [_label(name) for name in names]

    @staticmethod
    def statistics(routing: Iterable[Any]) -> list[dict[str, Tensor]]:
        """Scalars [] of every routed layer from an Output's routing.

        Those of `load_statistics`, dropped (fraction of choices), and router_entropy
        (nats, mean over real tokens) where the model has it. None leaves the device.
        """
        layers = []
        for record in routing:
            values = {
                **load_statistics(record.load),
                "dropped": record.dropped.detach(),
            }
            entropy = getattr(record, "entropy", None)
            if entropy is not None:
                values["router_entropy"] = entropy.detach()
            layers.append(values)
        return layers


def load_statistics(load: Tensor) -> dict[str, Tensor]:
    """How evenly load [..., E], tokens or choices of each expert, is spread: values [...].

    max_over_mean and min_over_mean: the busiest and the idlest expert's load over the
    mean load; both are 1 if it is even. cv2: population variance over squared mean.
    normalised_entropy: of the shares of load, over ln E; 1 if even, as one expert always
    is. unused: experts without a token. Without any load all but unused are 0. Nothing
    leaves the device.
    """
    load = load.detach().to(torch.promote_types(load.dtype, torch.float32))
    experts = load.shape[-1]
    total = load.sum(-1, keepdim=True)
    shares = load / total.where(total > 0, 1)
    ratios = shares * experts
    entropy = torch.special.entr(shares).sum(-1)  # 0 ln 0 is 0
    return {
        "max_over_mean": ratios.amax(-1),
        "min_over_mean": ratios.amin(-1),
        "cv2": ratios.var(-1, correction=0),
        "normalised_entropy": (
            entropy / math.log(experts) if experts > 1 else ratios[..., 0]
        ),
        "unused": (load == 0).sum(-1),
    }


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """Every list of layers."""
    found = (m for name, m in model.named_modules() if name.split(".")[-1] == "layers")
    return [stack for stack in found if isinstance(stack, nn.ModuleList)]


def _label(name: str) -> int | str:
    """`layers.3` as 3, `encoder.layers.3` as encoder 3, other names as they are."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return name
    stack, layer = found.groups()
    return f"{stack[:-1]} {layer}" if stack else int(layer)


def sample(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """One token [B] from logits [B, V]: the likeliest at temperature 0, else one drawn."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
