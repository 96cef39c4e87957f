"""All kernels are compiled for chips that need not be here, and spill nothing there.

Kernels that tests run are Python, by TRITON_INTERPRET, so compilation is in processes that are
without it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moegen_triton.aot import VARIANTS, cases
from moegen_triton.compiling import Resources, compiling, narrow_offsets, problems
from moegen_triton.kernels.candidates import KERNELS, TILES, TILES_FP32, TILES_ODD
from moegen_triton.launches import LAUNCHES

ROOT = Path(__file__).parent.parent
SOUND = Resources("up_kernel", 128, 0, 0, 65536, 8, {"HMMA": 64}, 0, 0, 1.0)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with kernels that compile, and nothing kept of what others compiled."""
    known = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "backends"), str(ROOT / "tests")]
    more = {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "error::UserWarning", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=known | more)


def compiled(folder: Path, code: str) -> Any:
    """Return what code prints as JSON."""
    done = run(folder, "-c", code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", TILES)
def test_every_tile_of_every_kernel_is_sound(capability: int, tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "moegen_triton.aot", "-c", str(capability), "-j", "1", "--json")
    found = json.loads(done.stdout)
    wrong = [(r["kernel"], r["variant"], r["tile"], r["problems"]) for r in found if r["problems"]]
    assert not wrong
    assert done.returncode == 0, done.stderr
    assert len(found) == len(list(cases(capability)))
    assert all(result["resources"] for result in found)


def test_cases_are_all_rows_of_all_tables() -> None:
    for capability, table in TILES.items():
        found = {(case.kernel, case.tile, case.dtype, case.more) for case in cases(capability)}
        for kernel in KERNELS:
            for tile in table[kernel]:
                assert (kernel, tile, "bfloat16", 0) in found
            assert {(kernel, tile, "float32", 0) for tile in TILES_FP32[kernel]} <= found
            assert {(kernel, tile, "bfloat16", 1) for tile in TILES_ODD[kernel]} <= found
    assert set(VARIANTS) == set(LAUNCHES) == set(KERNELS)


SPILLING = """
import json
from moegen_triton.aot import Case, as_data, compile_case
from moegen_triton.kernels.tiles import Tile

tiles = {80: Tile(128, 128, 64, 8, 2), 90: Tile(256, 128, 64, 8, 3, weights_tma=True)}
found = [compile_case(Case(c, "up", "bias", "bfloat16", tile)) for c, tile in tiles.items()]
found.append(compile_case(Case(89, "down", "rows", "bfloat16", Tile(128, 128, 64, 8, 6))))
found.append(compile_case(Case(90, "down", "rows", "bfloat16", Tile(48, 64, 64))))
print(json.dumps([as_data(one) for one in found]))
"""

NARROW = """
import json, torch, triton, triton.language as tl
from moegen_triton.compiling import compiling, narrow_offsets

@triton.jit
def copy(x, y, stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    at = row * stride + tl.arange(0, 128)
    tl.store(y + at, tl.load(x + at))

x = torch.zeros(8)
with compiling(90) as found:
    copy[(1,)](x, x, 5, WIDE=False)
    copy[(1,)](x, x, 5, WIDE=True)
print(json.dumps([len(narrow_offsets(one.ir)) for one in found]))
"""


def test_offsets_that_would_overflow_are_found(tmp_path: Path) -> None:
    file = tmp_path / "copies.py"
    file.write_text(NARROW)
    done = run(tmp_path, str(file))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [2, 0]


def test_tiles_that_spill_or_do_not_fit_are_found(tmp_path: Path) -> None:
    older, hopper, large, odd = compiled(tmp_path, SPILLING)
    for result in (older, hopper):
        (said,) = result["problems"]
        assert re.match(r"up_kernel: spills registers: \d+ \+ 0 bytes a thread, \d+ STL", said)
    (said,) = large["problems"]
    assert re.search(r"down_kernel: \d+ bytes of shared memory are more than 101376", said)
    assert not odd["resources"]
    assert "power of 2" in odd["problems"][0] or "Error" in odd["problems"][0]


@pytest.mark.parametrize(
    ("changes", "capability", "said"),
    [
        ({}, 80, []),
        ({"stack": 8}, 80, ["spills registers: 8 + 0 bytes a thread, 0 STL, 0 LDL"]),
        ({"local": 8}, 80, ["spills registers: 0 + 8 bytes a thread, 0 STL, 0 LDL"]),
        (
            {"spilled": 2, "fetched": 3},
            80,
            ["spills registers: 0 + 0 bytes a thread, 2 STL, 3 LDL"],
        ),
        ({"registers": 255, "warps": 16}, 80, ["255 registers in 16 warps do not fit"]),
        ({"shared": 170_000}, 80, ["170000 bytes of shared memory are more than 166912"]),
        ({"shared": 170_000, "tensor": {"HGMMA": 4}}, 90, []),
        ({"shared": 110_000}, 120, ["110000 bytes of shared memory are more than 101376"]),
        ({"tensor": {}}, 80, ["no HMMA among its instructions"]),
        ({}, 90, ["no HGMMA among {'HMMA': 64}"]),
        ({}, 100, ["no UTCHMMA among {'HMMA': 64}"]),
        ({"tensor": {"UTCHMMA": 8}}, 103, []),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], capability: int, said: list[str]) -> None:
    assert problems(SOUND._replace(**changes), capability, products=True) == said


def test_few_rows_use_the_instructions_that_all_chips_have() -> None:
    assert not problems(SOUND, 90, products=True, rows=16)
    assert not problems(SOUND._replace(tensor={}), 90, products=False)


def test_kernels_of_the_interpreter_are_not_compiled() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), compiling(90):
        pass


def test_a_chip_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "moegen_triton.aot", "-c", "75")
    assert done.returncode == 2
    assert "75 is none of 80, 89, 90, 100, 120" in done.stderr


def test_addresses_by_narrow_products_are_found() -> None:
    ir = """
    %c32_i32 = arith.constant 32 : i32
    %0 = tt.get_program_id x : i32
    %1 = arith.muli %0, %c32_i32 : i32
    %2 = arith.muli %1, %stride : i32
    %3 = arith.extsi %2 : i32 to i64
    %4 = tt.addptr %x, %3 : !tt.ptr<bf16>, i64
    %5 = tt.addptr %x, %1 : !tt.ptr<bf16>, i32
    """
    assert narrow_offsets(ir) == ["%4 = tt.addptr %x, %3 : !tt.ptr<bf16>, i64"]
