"""Emitted models work when FSDP2 shards their parameters: the same values and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_sharded_parameters_give_the_same_bits(backend: str, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(ROOT / "tests" / "sharded.py"), str(tmp_path / "store"), backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("equal")
