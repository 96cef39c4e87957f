"""The example of a mixture between LSTMs, in seconds."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

import moegen
from examples.lstm_moe import DENSE, SYSTEMS, main


def test_the_example_compares_all_systems(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--quick", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert {run["system"] for run in found["runs"]} == set(SYSTEMS)
    assert len(found["claims"]) == 6
    assert all(run["held_out"] for run in found["runs"])


def test_all_cost_about_as_much_a_byte() -> None:
    flops = {}
    for system, (spec, changes) in SYSTEMS.items():
        plan = moegen.plan(f"specs/{spec}.yaml", changes, batch=2, sequence=16)
        flops[system] = float(moegen.estimate(plan).training_flops)
    assert all(abs(each / flops[DENSE] - 1) < 0.05 for each in flops.values()), flops
