"""Vision models against transformers' ViT: logits, loss, gradients and weights there and back."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_transformers import close, laid_out, randomize, same
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

import moegen
from moegen.convert import ConversionError, to_huggingface, to_moegen
from moegen.ops.images import patch_positions

CASE = yaml.safe_load(
    (Path(__file__).parent / "data" / "transformers" / "vision" / "vit.yaml").read_text()
)


@functools.cache
def reference() -> Any:
    config = AutoConfig.for_model("vit", **CASE["config"])
    model = AutoModelForImageClassification.from_config(config, attn_implementation="eager")
    randomize(model)
    return model.eval()


@functools.cache
def emitted() -> Any:
    return moegen.module(CASE["spec"])


@functools.cache
def saved() -> dict[str, torch.Tensor]:
    return laid_out(reference())


def test_logits_loss_and_gradients() -> None:
    theirs, model = reference(), emitted().Model().eval()
    model.load_state_dict(to_moegen("vit", saved()))
    images = torch.randn(3, 2, 12, 12, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([2, 0, 6])
    expected = theirs(images, labels=labels)

    loss, output = model.training_loss(images, labels)

    close(output.logits, expected.logits, "logits")
    close(loss, expected.loss, "loss")
    theirs.zero_grad()
    expected.loss.backward()
    loss.backward()
    graded = copy.deepcopy(theirs)
    with torch.no_grad():
        for copied, original in zip(graded.parameters(), theirs.parameters(), strict=True):
            copied.copy_(original.grad)
    wanted = to_moegen("vit", laid_out(graded))
    for key, parameter in model.named_parameters():
        close(parameter.grad, wanted[key], f"gradient of {key}")
        if not key.endswith("key_bias"):  # a softmax does not see it, so its gradient is rounding
            error = (parameter.grad - wanted[key]).norm() / wanted[key].norm()
            assert error <= 1e-4, f"gradient of {key}: off by {error} of its norm"


def test_weights_there_and_back() -> None:
    same(to_huggingface("vit", to_moegen("vit", saved())), saved())
    fresh = emitted().Model().state_dict()
    same(to_moegen("vit", to_huggingface("vit", fresh)), fresh)


def test_every_tensor_is_needed() -> None:
    theirs = saved()
    for convert, tensors in ((to_moegen, theirs), (to_huggingface, to_moegen("vit", theirs))):
        for key in tensors:
            rest = {k: v for k, v in tensors.items() if k != key}
            with pytest.raises(ConversionError):
                convert("vit", rest)


def test_the_published_model_has_these_tensors() -> None:
    """The defaults of transformers' config are ViT-B/16."""
    config = AutoConfig.for_model("vit", num_labels=1000)
    with torch.device("meta"):
        theirs = AutoModelForImageClassification.from_config(config)
        model = moegen.module(Path(__file__).parents[1] / "specs" / "vit-b16.yaml").Model()
    assert model.num_parameters() == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("before", [0, 1])
def test_sines_are_those_of_masked_autoencoders(before: int) -> None:
    theirs = build_2d_sinusoidal_position_embedding(3, 5, 24, cls_token=bool(before))
    assert torch.equal(patch_positions(3, 5, 24, before), theirs)
