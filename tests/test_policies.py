"""The training of all policies, tiny: a few steps of a few, and the figures that are committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import moegen
from benchmarks import policies, policy_training
from benchmarks.policy_specs import PARTS, POLICIES, PRESETS, spec
from benchmarks.policy_training import Options, made, own, share_dense_part, task_of, texts
from moegen.spec import presets

NAMES = ("dense", "limoe", "base")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "texts", lambda: texts(400_000))


@pytest.mark.usefixtures("small")
def test_a_few_policies_are_trained_and_written_down(tmp_path: Path) -> None:
    page, record = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text(f"# All\n\n{policies.BEGIN}\nold\n{policies.END}\n\nend\n")
    chosen = [word for name in NAMES for word in ("--policy", name)]
    threads = torch.get_num_threads()
    given = [*chosen, "--steps", "2", "--page", str(page), "--json", str(record)]
    result = CliRunner().invoke(policies.main, given)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("# All\n")
    assert text.endswith("\nend\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(NAMES)
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| dense", "| `limoe` †", "| `base` †"]
    found = {policy["name"]: policy for policy in json.loads(record.read_text())["policies"]}
    assert all(one["after"] < one["before"] for one in found.values())
    assert found["base"]["load_max_over_mean"] == 1
    assert found["limoe"]["dropped_train"] > 0
    again = ["--policy", "switch-base", *given[len(chosen) :]]
    assert CliRunner().invoke(policies.main, again).exit_code == 0
    torch.set_num_threads(threads)
    kept = json.loads(record.read_text())["policies"]
    assert [one["name"] for one in kept] == ["dense", "switch-base", "base", "limoe"]
    assert kept[2] == found["base"]


@pytest.mark.usefixtures("small")
def test_a_policy_that_learns_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_training, "RATE", 0.0)
    given = ["--policy", "dense", "--steps", "1", "--json", str(tmp_path / "none.json")]
    result = CliRunner().invoke(policies.main, given)
    assert result.exit_code == 1
    assert "did not lower the held-out loss: dense" in result.output
    assert not (tmp_path / "none.json").exists()
    assert CliRunner().invoke(policies.main, ["--policy", "nothing"]).exit_code == 1


@pytest.mark.parametrize("name", ["switch-base", "base"])
def test_what_is_not_routed_starts_alike(name: str) -> None:
    dense = made(moegen.plan(spec(None)), 0)
    model = made(moegen.plan(spec(POLICIES[name])), 1)
    share_dense_part(dense, model)
    assert torch.equal(dense.embedding, model.embedding)
    assert len(own(dense)) == len(own(model)) == 2
    for ours, theirs in zip(own(model), own(dense), strict=True):
        known = dict(theirs.named_parameters())
        common = [n for n, _ in ours.named_parameters() if n in known]
        assert common
        assert all(torch.equal(ours.get_parameter(n), known[n]) for n in common)


def test_ids_are_of_the_text() -> None:
    assert [task_of(Path(p)) for p in ("re.py", "encodings/a.py", "tkinter/b.py", "json/c.py")] == [
        0,
        1,
        2,
        3,
    ]
    text, _ = texts(400_000)
    ids, given = text.at(torch.tensor([0, 50]), 16)
    assert given["modality"].shape == ids.shape
    for byte, letter in zip(ids.flatten().tolist(), given["modality"].flatten(), strict=True):
        assert bool(letter) == chr(byte).isalpha() or byte > 127
    assert given["task"].tolist() == [0, 0]


def test_the_list_has_every_preset_that_is_not_another_one() -> None:
    aliases = {n for n in presets.names("moe") if "Short for" in str(presets.about("moe", n).notes)}
    # On equal experts in equal places NLLB's routing is that of fairseq's language models.
    assert set(presets.names("moe")) - aliases - {"nllb-moe"} == set(PRESETS)
    assert not set(PRESETS) & set(PARTS)


def test_figures_are_of_all_policies_that_there_are() -> None:
    figures = json.loads(policies.RECORD.read_text(encoding="utf-8"))
    assert [one["name"] for one in figures["policies"]] == list(POLICIES)
    options = Options(**figures["options"])
    outcomes = [policy_training.Outcome(**one) for one in figures["policies"]]
    assert all(one.learned for one in outcomes)
    table = policies.markdown(outcomes, options, figures["machine"])
    assert table in policies.PAGE.read_text(encoding="utf-8")
