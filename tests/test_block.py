"""What a block adds to the stream: the dense branch after experts, and norms without a scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moegen

SPEC: dict[str, Any] = {
    "name": "small",
    "model": {
        "kind": "decoder",
        "vocab_size": 32,
        "d_model": 16,
        "layers": 2,
        "norm": {"kind": "rms", "eps": 1e-6},
        "attention": {"heads": 2, "head_dim": 8},
        "ffn": {"width": 24},
        "moe": {
            "placement": {"every": 2, "offset": 1},
            "experts": {"count": 4, "width": 8},
        },
    },
}


def made(**overrides: Any) -> Any:
    torch.manual_seed(0)
    module = moegen.module(SPEC, {k.replace("__", "."): v for k, v in overrides.items()})
    return module.Model().eval()


@pytest.mark.parametrize("placement", ["pre", "sandwich", "output", "post"])
def test_the_extra_network_is_a_branch_of_its_own(placement: str) -> None:
    extra = made(moe__extra={"width": 12}, model__norm__placement=placement)
    plain = made(model__norm__placement=placement)
    state = {k: v for k, v in extra.state_dict().items() if ".extra" not in k}
    plain.load_state_dict(state)
    seen: list[Tensor] = []
    plain.layers[1].register_forward_hook(lambda module, args, out: seen.append(out[0]))
    extra.layers[1].register_forward_hook(lambda module, args, out: seen.append(out[0]))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        plain(ids)
        extra(ids)
    before, after = seen
    torch.testing.assert_close(after, expected(extra.layers[1], before, placement))


def expected(block: Any, x: Tensor, placement: str) -> Tensor:
    """x + FFN(norm(x)) with the norms where the placement has them."""

    def norm(value: Tensor, name: str) -> Tensor:
        return F.rms_norm(value, (16,), getattr(block, name), 1e-6)

    h = norm(x, "extra_norm") if placement in ("pre", "sandwich") else x
    hidden = F.silu(F.linear(h, block.extra.gate)) * F.linear(h, block.extra.up)
    out = F.linear(hidden, block.extra.down)
    if placement == "output":
        out = norm(out, "extra_norm")
    if placement == "sandwich":
        out = norm(out, "extra_norm_out")
    return norm(x + out, "extra_norm") if placement == "post" else x + out


def test_decoding_goes_through_the_extra_network() -> None:
    model = made(moe__extra={"width": 12})
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.new_cache(2, 6)
        steps = [model.step(ids[:, i : i + 1], torch.tensor(i), cache) for i in range(6)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_without_scale_is_one_whose_scale_is_one(kind: str) -> None:
    norm = {"kind": kind, "eps": 1e-6, **({"bias": False} if kind == "layer" else {})}
    bare = made(model__norm={**norm, "scale": False})
    whole = made(model__norm=norm)
    names = {name for name, _ in whole.named_parameters()}
    missing = names - {name for name, _ in bare.named_parameters()}
    assert len(missing) == 2 * 2 + 1
    whole.load_state_dict(bare.state_dict(), strict=False)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(bare(ids).logits, whole(ids).logits)
