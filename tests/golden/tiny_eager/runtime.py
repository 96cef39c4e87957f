"""What a decoder-only model can do beside its network: generate, save, load, checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class LanguageModel(nn.Module):
    """Base of a model that has `forward`, `loss`, `step` and `new_cache`."""

    layers: Any

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
        total = self.loss(output.logits, labels)
        for value in getattr(output, "losses", {}).values():
            total = total + value
        return total, output

    def checkpoint_layers(self, every: int = 1) -> None:
        """Recompute every so many layers in the backward pass instead of keeping them."""
        for layer in list(self.layers)[::every]:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

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
            ids = _sample(logits, temperature, top_k).unsqueeze(-1)
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

    def routed_layers(self) -> list[int]:
        """The layers that are routed, counted from 0, in the order of Output's routing."""
        return [i for i, layer in enumerate(self.layers) if hasattr(layer, "moe")]

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


def _sample(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """One token [B] from logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
