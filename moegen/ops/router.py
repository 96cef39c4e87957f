"""A router in one op: the product, the scores, the choice and the weights of what is chosen."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moegen.ops.op import op
from moegen.ops.routing import top_k


def _saves(*_: Any, affinity: str = "softmax", **__: Any) -> tuple[str, ...]:
    """What kernels keep: tokens, scores (logits where these are the same), choices, weights."""
    return ("tokens", "out.0" if affinity == "none" else "out.1", "out.2", "out.3")


def _inside(tokens: Tensor, router: Tensor, *_: Any, **__: Any) -> tuple[int, int]:
    """Backward, the gradient of logits in fp32."""
    return 0, 4 * tokens.shape[0] * router.shape[0]


@op(
    flops=lambda tokens, router, *_, **__: 2 * tokens.numel() * router.shape[0],
    saves=_saves,
    inside=_inside,
)
def route(
    tokens: Tensor,
    router: Tensor,
    bias: Tensor | None = None,
    balance_bias: Tensor | None = None,
    *,
    k: int,
    affinity: str = "softmax",
    normalize: str = "none",
    eps: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and scores [T, E] of tokens [T, d], experts chosen [T, k] and their weights [T, k].

    router [E, d] and all that comes of it are float32. affinity: softmax, sigmoid or none, which
    makes scores of logits. The k best by score, plus balance_bias [E], are chosen, best first,
    ties to the lowest index. normalize: none weighs by score, sum divides scores by their sum
    plus eps, softmax_over_kept takes the softmax of the chosen logits. scale comes last.
    """
    logits = F.linear(tokens.to(router.dtype), router, bias)
    scores = logits
    if affinity == "softmax":
        scores = logits.softmax(-1)
    if affinity == "sigmoid":
        scores = torch.sigmoid(logits)
    experts = top_k(scores if balance_bias is None else scores + balance_bias, k)
    if normalize == "softmax_over_kept":
        weights = logits.gather(-1, experts).softmax(-1)
    else:
        weights = scores.gather(-1, experts)
    if normalize == "sum":
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return logits, scores, experts, weights * scale
