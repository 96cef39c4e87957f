"""`moegen show --routing`: what sentences say of every policy, and some texts word by word.

`pytest tests/test_routing_words.py --update-golden` rewrites the texts in tests/golden/routing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from routing_specs import MIXTURES, ROUTED
from tiny_models import BATCH, LENGTH, planned

import moegen
from moegen.arch.account import Account, accounts
from moegen.arch.setting import Setting
from moegen.cli import cli
from moegen.report.routing import routing_facts

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "routing"
SPECS = sorted(path.stem for path in (ROOT / "specs").glob("*.yaml"))
TEXTS = {
    **{
        name: ROUTED[name]
        for name in ("gshard", "fairseq", "v-moe", "base", "soft", "identity", "nested", "mask")
    },
    "deepseek-v3": str(ROOT / "specs" / "deepseek-v3.yaml"),
    "openmoe-8b": str(ROOT / "specs" / "openmoe-8b.yaml"),
}


def account(name: str) -> Account:
    (found,) = accounts(moegen.load(ROUTED[name]).spec, BATCH, LENGTH)
    return found


def said(found: Account) -> dict[str, str]:
    return {one.part: " ".join(one.sentences) for one in found.parts}


def as_text(source: Any) -> str:
    """An account as a text: a line for each sentence."""
    lines = []
    for layers in routing_facts(source, (), BATCH, None)["layers"]:
        lines.append(f"layers {', '.join(map(str, layers['layers']))}: {layers['title']}")
        for part in layers["parts"]:
            lines += [f"  {part['part']}: {sentence}" for sentence in part["sentences"]]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_is_the_one_that_was_reviewed(name: str, update_golden: bool) -> None:
    file, text = GOLDEN / f"{name}.txt", as_text(TEXTS[name])
    if update_golden:
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ROUTED)
def test_every_policy_is_told_with_its_numbers(name: str) -> None:
    found, moe = account(name), planned(ROUTED[name]).spec.model.moe
    text = said(found)
    assert f"{moe.num_choices} experts" in text["router.select"]
    if moe.router.select.kind == "top_k" and moe.router.score.learned:
        number = "one" if moe.chosen == 1 else str(moe.chosen)
        assert f"takes the {number} with the highest" in text["router.select"]
    assert text["router.input"].startswith("The router sees ")
    assert f"{moe.num_experts} expert" in text["experts"]
    assert moe.experts.activation.kind in text["experts"]
    assert str(moe.expert_width) in text["experts"]
    losses = {part.removeprefix("losses.") for part in text if part.startswith("losses.")}
    assert losses == set(moe.losses)
    for key, loss in moe.losses.items():
        assert text[f"losses.{key}"].startswith(f"{loss.weight:g} times ")
    for part in ("noise", "restrict", "balance_bias", "gates"):
        assert (f"router.{part}" in text) == (getattr(moe.router, part) is not None)
    if moe.router.noise:
        assert text["router.noise"].startswith("In training only, ")
    assert ("capacity" in text) == moe.router.select.tokens_choose - (name == "base")


@pytest.mark.parametrize("name", [name for name, moe in MIXTURES.items() if moe.get("capacity")])
def test_slots_are_those_of_the_emitted_model(name: str) -> None:
    """As many as an expert takes at most where all tokens want the same."""
    moe = planned(ROUTED[name]).spec.model.moe
    setting = Setting(planned(ROUTED[name]).spec, moe, BATCH, LENGTH)
    text = said(account(name))["capacity"]
    numbers = set(re.findall(r"[\d,]+", text))
    assert str(setting.room(training=True)) in numbers
    if moe.capacity.eval_factor != "unlimited":
        assert str(setting.room(training=False)) in numbers


@pytest.mark.parametrize("name", ROUTED)
def test_sentences_are_sentences(name: str) -> None:
    for part in account(name).parts:
        for sentence in part.sentences:
            assert re.match(r"[A-Z0-9]", sentence), sentence
            assert sentence.endswith("."), sentence
            assert "  " not in sentence
            assert not re.search(r"\b1 (experts|slots|choices|tokens|numbers|groups)\b", sentence)
            assert not re.search(r"\bNone\b|\bTrue\b|\bFalse\b|[{}]|\.\.", sentence)


@pytest.mark.parametrize("name", ROUTED)
def test_a_change_of_a_number_changes_the_text(name: str) -> None:
    """More experts, or a wider batch where there is a capacity, are told."""
    before = said(account(name))
    spec = planned(ROUTED[name]).spec
    (other,) = accounts(spec, BATCH, 20 * LENGTH)
    changed = {part for part, text in said(other).items() if before[part] != text}
    moe = spec.model.moe
    fixed = moe.capacity and moe.capacity.slots is not None
    competes = moe.capacity or moe.router.select.kind in ("expert_choice", "balanced")
    if competes and isinstance(moe.group, str):
        assert "capacity" in changed or "router.select" in changed or fixed
    elif moe.capacity is None and not competes:
        assert changed <= {"router.affinity"}


@pytest.mark.parametrize("name", SPECS)
def test_specs_are_told(name: str) -> None:
    spec = moegen.load(ROOT / "specs" / f"{name}.yaml").spec
    found = accounts(spec, 1, 1024)
    model: Any = spec.model
    layers = sorted((one.stack, layer) for one in found for layer in one.layers)
    assert layers == sorted((one.stack, one.layer) for one in model.routed())
    for one in found:
        assert {"router.select", "experts", "parameters"} <= said(one).keys()
        assert ("causality" in said(one)) == model.decodes(one.stack)


def show(*arguments: str, code: int = 0, width: int = 80) -> str:
    result = CliRunner().invoke(cli, ["show", "--routing", *arguments], env={"COLUMNS": str(width)})
    assert result.exit_code == code, result.output
    return result.output


TINY = str(ROOT / "specs" / "tiny.yaml")


@pytest.mark.parametrize("width", [80, 120])
def test_the_command_keeps_to_the_width(width: int) -> None:
    text = show(TINY, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "layers 1-3 of 4: Mixture of 16 experts" in text
    assert "…" not in text


def test_layers_that_differ_are_told_apart() -> None:
    other = "moe.overrides=[{layers: [2], experts: {count: 8}, capacity: 2.0}]"
    text = show(TINY, "-o", other, "--sequence", "64", "--batch", "2")
    assert "2 x 64 tokens" in text
    assert "layers 1, 3 of 4: Mixture of 16 experts" in text
    assert "layer 2 of 4: Mixture of 8 experts" in text
    assert "room for 32 choices" in " ".join(text.split())


def test_a_model_without_routing_says_so() -> None:
    assert "no routed layers" in show(TINY, "-o", "moe=null")


def test_json_has_these_keys() -> None:
    found = json.loads(show(TINY, "--json", "--sequence", "32"))
    assert list(found) == ["name", "batch", "sequence", "layers"]
    (layers,) = found["layers"]
    assert list(layers) == ["layers", "title", "parts"]
    assert layers["layers"] == [1, 2, 3]
    score = next(part for part in layers["parts"] if part["part"] == "router.score")
    assert score["kind"] == "linear"
    assert score["sentences"] == ["A learned matrix gives each of 16 experts a logit, in fp32."]


@pytest.mark.parametrize("extra", [("moe",), ("--format", "dot"), ("--program", "step")])
def test_what_does_not_go_together(extra: tuple[str, ...]) -> None:
    assert "--routing takes no" in show(TINY, *extra, code=2)


def test_json_without_routing_is_refused() -> None:
    result = CliRunner().invoke(cli, ["show", TINY, "--json"])
    assert result.exit_code == 2
    assert "--json is for --routing" in result.output


def test_presets_are_told(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    body = {"name": "x", "extends": TINY, "model": {"moe": {"preset": "switch-base"}}}
    spec.write_text(yaml.safe_dump(body))
    assert "multiplied by a random factor" in " ".join(show(str(spec)).split())
