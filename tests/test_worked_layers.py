"""Worked cases of whole routed layers (reference B, C)."""

from __future__ import annotations

import torch
from torch import Tensor
from worked_numbers import (
    Case,
    Layer,
    decoder,
    emitted,
    relu_experts,
    same,
    worked,
)


def linear(layer: Layer, matrices: Tensor) -> Layer:
    """Give linear experts [E, n, d] their matrices, with n as wide as the token."""
    width = layer.net.up.shape[2]
    down = torch.eye(width, dtype=torch.float64)[:, : matrices.shape[1]]
    return layer.set(up=matrices, down=down)


@worked("upcycling-equivalence")
def test_a_mixture_of_copies_is_the_dense_network(case: Case) -> None:
    matrix, x = case["dense_weight"], case["x"].unsqueeze(0)
    network = {"width": 2, "activation": "relu"}
    dense = emitted(decoder(None, 2, ffn=network)).model.FeedForward()
    with torch.no_grad():
        dense.up.copy_(matrix)
        dense.down.copy_(torch.eye(2))
    case.holds(dense_output=dense(x)[0])
    logits = case["router_probs"].log()
    for name, router in (
        ("top2_normalised", {"select": 2, "gate": "sum"}),
        ("top2_raw", {"select": 2}),
        ("top1_raw", {"select": 1}),
    ):
        layer = Layer({"experts": {"count": 4, **network}, "router": router}, 2)
        layer.set(router=logits.unsqueeze(1) / x.sum())
        same(relu_experts(layer, matrix.expand(4, 2, 2)).run(x)[0], case.want(name))


@worked("openmoe-residual-parallel-vs-sequential")
def test_a_dense_network_beside_or_after_the_mixture(case: Case) -> None:
    network = {"width": 2, "activation": "linear"}
    for name, where in (("parallel_paper", "residual"), ("sequential_code", "extra")):
        moe = {"experts": {"count": 1, **network}, "router": {"select": 1}, where: network}
        norm = {"kind": "rms", "eps": 1e-30}
        attention = {"heads": 1, "head_dim": 2, "rope": None}
        code = emitted(decoder(moe, 2, norm=norm, attention=attention)).model
        block = code.MoEBlock()
        mixture = block.moe
        beside = mixture.residual if where == "residual" else block.extra
        with torch.no_grad():
            block.attention.output.zero_()
            mixture.up.copy_(case["moe_map"])
            beside.up.copy_(case["ffn_map"])
            mixture.down.copy_(torch.eye(2))
            beside.down.copy_(torch.eye(2))
        context = code.Context(valid=torch.ones(1, dtype=torch.bool))
        out, _ = block(case["x"].view(1, 1, 2), context)
        same(out[0, 0], case.want(name))


@worked("shazeer-lm-moe-sublayer")
def test_the_mixture_between_recurrent_cells(case: Case) -> None:
    x, weights = case["x"], case["gates"].log().clamp(min=-1e4)
    experts = {"count": 2, "width": 2, "activation": "linear"}
    router = {"select": 2, "gate": "softmax_over_kept"}
    layer = Layer({"experts": experts, "router": router}, 2)
    # Tokens are independent, so there are matrices that give them any gates and any outputs.
    linear(layer, torch.linalg.solve(x, case["expert_outputs"].transpose(0, 1)).mT)
    layer.set(router=torch.linalg.solve(x, weights).t())
    case.holds(moe_output=layer.run(x))
    moe = {"experts": experts, "router": router, "placement": {"insert": 1}}
    model = {"kind": "recurrent", "vocab_size": 8, "d_model": 2, "layers": 2, "moe": moe}
    package = emitted({"name": "between", "model": model, "precision": layer.spec["precision"]})
    sublayer = package.model.MixtureLayer()
    sublayer.moe.load_state_dict(layer.net.state_dict())
    out, _ = sublayer(x.unsqueeze(0), torch.ones(2, dtype=torch.bool))
    case.holds(sublayer_output=out[0])
