"""Whole emitted packages, kept in tests/golden, so that a change of them shows in a diff.

`pytest tests/test_golden.py --update-golden` rewrites them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_specs import SPECS

import moegen
from moegen.api import import_package
from moegen.backend import backend
from moegen.emit.package import Package, package

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
KEPT = ("tiny", "deepseek-v3-like", "gpt-oss-like")


def source(name: str) -> object:
    return ROOT / "specs" / "tiny.yaml" if name == "tiny" else SPECS[name]


def emitted(name: str, *, batch: int = 1, sequence: int = 16) -> Package:
    plan = moegen.plan(source(name), batch=batch, sequence=sequence)  # type: ignore[arg-type]
    return package(plan, backend("eager"))


@pytest.mark.parametrize("name", KEPT)
def test_the_package_is_the_one_that_was_reviewed(name: str, update_golden: bool) -> None:
    folder = GOLDEN / f"{name.replace('-', '_')}_eager"
    made = emitted(name).files
    if update_golden:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file, text in made.items():
            (folder / file).write_text(text, encoding="utf-8")
    kept = {p.name: p.read_text(encoding="utf-8") for p in folder.iterdir() if p.is_file()}
    assert kept.keys() == made.keys()
    for file, text in made.items():
        assert text == kept[file], f"{file} changed; see the diff after pytest --update-golden"


@pytest.mark.parametrize("name", KEPT)
def test_a_golden_package_imports_and_runs(name: str) -> None:
    import torch

    model = import_package(GOLDEN / f"{name.replace('-', '_')}_eager").Model()
    loss, _ = model.training_loss(torch.zeros(2, 8, dtype=torch.int64))
    loss.backward()
    assert torch.isfinite(loss)


def test_the_text_does_not_depend_on_the_workload() -> None:
    small, large = emitted("tiny"), emitted("tiny", batch=3, sequence=200)
    assert small.files == large.files


_HASH = """
import hashlib, moegen
from moegen.backend import backend
from moegen.emit.package import package
files = package(moegen.plan("specs/tiny.yaml", sequence=16), backend("eager")).files
print(hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest())
"""


def test_the_bytes_do_not_depend_on_the_hash_seed() -> None:
    def digest(seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", _HASH],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            check=True,
        )
        return done.stdout.decode().strip()

    here = hashlib.sha256(repr(sorted(emitted_from_root().items())).encode()).hexdigest()
    assert {digest("1"), digest("2")} == {here}


def emitted_from_root() -> dict[str, str]:
    """As the child process does it: file names in messages are relative to the root."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        plan = moegen.plan("specs/tiny.yaml", sequence=16)
        return dict(package(plan, backend("eager")).files)
    finally:
        os.chdir(before)
