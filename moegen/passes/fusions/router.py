"""A router as one op: product, affinity, top-k and gate, where nothing stands between them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from moegen.graph import meta
from moegen.graph.component import Component
from moegen.ops.gradients import scale_gradient
from moegen.ops.router import route
from moegen.ops.routing import top_k
from moegen.passes.fuse import word


def fuse_router(component: Component, graph: fx.Graph) -> None:
    """Routers in float32 that choose by score, with a balance bias or none.

    Noise, groups of experts and other affinities stay as they are, and so does a router in 16
    bits, whose product would have another precision.
    """
    for node in list(graph.nodes):
        if node.target is top_k:
            found = _router(component, node)
            if found is not None:
                _rewrite(found)


@dataclass
class _Router:
    """What was found: the op's arguments, and the nodes that hold its four results."""

    tokens: Any
    router: fx.Node
    bias: Any
    results: list[fx.Node | None]
    named: dict[str, Any]
    balance_bias: Any = None
    inside: list[fx.Node] = field(default_factory=list)


def _router(component: Component, choice: fx.Node) -> _Router | None:
    ranked, k = choice.args
    scores, balance_bias = _biased(component, ranked)
    logits, affinity = _scored(scores)
    if logits.target is not F.linear:
        return None
    tokens, router, bias = (*logits.args, None)[:3]
    source = router.args[0] if router.target is scale_gradient else router
    weight = component.weights.get(str(getattr(source, "target", None)))
    if weight is None or weight.dtype != torch.float32:
        return None
    named: dict[str, Any] = {"k": k, "affinity": affinity}
    cast = [tokens] if _is_cast(tokens) else []
    inside = [*cast, logits, *([scores] if scores is not logits else [])]
    inside += [ranked] if balance_bias is not None else []
    scores_node = scores if scores is not logits else None
    found = _Router(tokens, router, bias, [logits, scores_node, choice, None], named)
    found.balance_bias, found.inside = balance_bias, [*inside, choice]
    if cast:
        found.tokens = tokens.args[0]
    return found if _weighed(found, logits, scores, choice) else None


def _is_cast(node: Any) -> bool:
    return node.target == "to" and node.args[1:] == (torch.float32,) and len(node.users) == 1


def _biased(component: Component, ranked: Any) -> tuple[Any, Any]:
    """Scores, and the balance bias that was added to them, if one was."""
    if ranked.target is operator.add:
        scores, bias = ranked.args
        if isinstance(bias, fx.Node) and bias.op == "get_attr":
            alone = len(ranked.users) == 1
            return (scores, bias) if alone else (ranked, None)
    return ranked, None


def _scored(scores: Any) -> tuple[Any, str]:
    """Logits, and the affinity that made scores of them."""
    if scores.target == "softmax" and scores.args[1:] == (-1,):
        return scores.args[0], "softmax"
    if scores.target is torch.sigmoid or scores.target == "sigmoid":
        return scores.args[0], "sigmoid"
    return scores, "none"


def _weighed(found: _Router, logits: fx.Node, scores: fx.Node, choice: fx.Node) -> bool:
    """Find the weights of the chosen experts; whether there are any of a known form."""
    gathers = [u for u in choice.users if u.target == "gather" and u.args[1:] == (-1, choice)]
    if len(gathers) != 1:
        return False
    (weights,) = gathers
    source = weights.args[0]
    found.inside.append(weights)
    users = list(weights.users)
    if source is logits and len(users) == 1 and users[0].target == "softmax":
        weights = users[0]
        found.inside.append(weights)
        found.named["normalize"] = "softmax_over_kept"
    elif source is not scores:
        return False
    else:
        weights = _normalized(found, weights)
    scaled = list(weights.users)
    if len(scaled) == 1 and scaled[0].target is operator.mul:
        factor = scaled[0].args[1]
        if isinstance(factor, float) and scaled[0].args[0] is weights:
            weights = scaled[0]
            found.inside.append(weights)
            found.named["scale"] = factor
    found.results[3] = weights
    return True


def _normalized(found: _Router, weights: fx.Node) -> fx.Node:
    """Weights divided by their sum, if they are."""
    totals = [u for u in weights.users if u.target == "sum"]
    if len(totals) != 1 or totals[0].kwargs != {"keepdim": True}:
        return weights
    nodes, eps = [totals[0]], 0.0
    users = list(totals[0].users)
    if len(users) == 1 and users[0].target is operator.add and isinstance(users[0].args[1], float):
        nodes.append(users[0])
        eps = users[0].args[1]
        users = list(users[0].users)
    shares = users[0] if len(users) == 1 else None
    if shares is None or shares.target is not operator.truediv or shares.args[0] is not weights:
        return weights
    if set(weights.users) != {totals[0], shares}:
        return weights
    found.inside += [*nodes, shares]
    found.named["normalize"] = "sum"
    if eps:
        found.named["eps"] = eps
    return shares


def _rewrite(found: _Router) -> None:
    """Put the op where the product stood, and its results in place of the old ones."""
    place = found.inside[0]
    graph = place.graph
    biases = {"bias": found.bias, "balance_bias": found.balance_bias}
    args = (found.tokens, found.router)
    named = {k: v for k, v in biases.items() if v is not None} | found.named
    for node in (*args, *biases.values()):
        for early in _parameter(node):
            if place < early:
                place.prepend(early)
    with graph.inserting_before(place):
        made = graph.call_function(route, args, named)
        parts = [graph.call_function(operator.getitem, (made, i)) for i in range(4)]
    made.meta = {k: v for k, v in place.meta.items() if k in (meta.ORIGIN, meta.SECTION)}
    made.meta[meta.FUSED] = tuple(map(word, found.inside))
    for part, old, name in zip(parts, found.results, _NAMES, strict=True):
        part.meta = {**made.meta, meta.PART: True, meta.NAME: name}
        part.meta.pop(meta.FUSED)
        if old is not None:
            part.meta[meta.NAME] = meta.name(old) or name
            old.replace_all_uses_with(part)
    for node in reversed(found.inside):
        if not node.users:
            graph.erase_node(node)
    for part in parts:
        if not part.users:
            graph.erase_node(part)


def _parameter(node: Any) -> list[fx.Node]:
    """The nodes that read a parameter, and scale its gradient if that is done."""
    if not isinstance(node, fx.Node):
        return []
    if node.target is scale_gradient:
        return [*_parameter(node.args[0]), node]
    return [node] if node.op == "get_attr" else []


_NAMES = ("logits", "scores", "experts", "weights")
