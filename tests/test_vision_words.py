"""What the commands say of vision models: images, not sequences, and nothing of decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from image_specs import VISION, given, images, labels, ready

import moegen
from moegen.arch.account import accounts
from moegen.cli import cli
from moegen.observe import Recorder

SPECS = Path(__file__).parent.parent / "specs"


def said(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return done.output


def test_an_estimate_is_of_images() -> None:
    text = said("estimate", str(SPECS / "vmoe-b16-every-2.yaml"), "--batch", "8", "--gpu", "h100")
    for words in (
        "active for a token",
        "Active parameters of one token",
        "FLOPs per image",
        "An image is 197 tokens: 14 x 14 patches and a class token.",
        "Memory for training: 8 images of 197 tokens",
        "images a second",
    ):
        assert words in text, words
    for words in ("ecoding", "cache", "causal", "sequence"):
        assert words not in text, words


def test_images_a_second_are_those_of_the_roofline() -> None:
    spec = str(SPECS / "vmoe-b16-every-2.yaml")
    facts = json.loads(said("estimate", spec, "--batch", "8", "--gpu", "h100", "--json"))
    gpu = facts["gpu"]
    assert gpu["images_per_second"] == pytest.approx(8 / gpu["forward_seconds"])
    assert facts["cache"] is None
    assert facts["workload"]["sequence"] == 197
    per_image = facts["flops_per_image"]["forward"]
    assert gpu["images_per_second"] * per_image <= 989.5e12


def test_flops_of_an_image_do_not_depend_on_how_many_there_are() -> None:
    spec = SPECS / "vit-b16.yaml"
    one, eight = (moegen.estimate(spec, batch=n).forward_flops for n in (1, 8))
    assert one == eight
    tokens, d, width = 197, 768, 3072
    block = 2 * tokens * (4 * d * d + 2 * d * width) + 4 * tokens * tokens * d
    patches, head = 2 * 196 * 16 * 16 * 3 * d, 2 * d * 1000
    assert one == 12 * block + patches + head


@pytest.mark.parametrize("command", ["estimate", "show"])
def test_a_sequence_is_refused_with_the_reason(command: str) -> None:
    text = said(command, str(SPECS / "vit-b16.yaml"), "--sequence", "300", code=2)
    reason = "an image of 224 x 224 in patches of 16 x 16 is always 197 tokens here, not 300"
    assert reason in text
    assert "model.image.size" in text


@pytest.mark.parametrize("name", [n for n in sorted(VISION) if "moe" in VISION[n]["model"]])
def test_routing_is_told_without_decoding(name: str) -> None:
    spec = moegen.load(VISION[name]).spec
    (account, *_) = accounts(spec, 2, spec.model.tokens)
    parts = {part.part for part in account.parts}
    assert not {"decoding", "causality"} & parts
    text = " ".join(sentence for part in account.parts for sentence in part.sentences)
    assert "sequence" not in text
    assert "decod" not in text
    assert list(spec.warnings()) == []
    if name == "soft-moe":
        assert "4 slots for an image" in text


def test_a_picture_starts_with_images_and_ends_with_an_output() -> None:
    text = said("show", str(SPECS / "vmoe-mnist.yaml"), "--format", "mermaid")
    assert text.startswith("flowchart TD")
    order = ["images", "patches", "class_token", "positions", "DenseBlock", "MoEBlock", "output"]
    places = [text.index(f'"{word}') for word in order]
    assert places.index(max(places)) == len(order) - 1
    assert "2 times" in text


@pytest.mark.parametrize("name", ["vmoe", "soft-moe", "mod-squad"])
def test_a_recorder_takes_what_a_vision_model_gives(name: str) -> None:
    model = ready(name)
    recorder = Recorder(layers=model.routed_layers())
    for step in range(3):
        _, output = model.training_loss(images(name), labels(), **given(name))
        recorder.record(step, output.routing)
    assert recorder.history()
    statistics: list[dict[str, Any]] = model.statistics(output.routing)
    assert len(statistics) == len(model.routed_layers())
    assert all(torch.isfinite(value).all() for row in statistics for value in row.values())
