"""Tiles of the Triton kernels: the tables, the cost model, and what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from moegen_triton import tune
from moegen_triton.kernels import chips, tiles
from moegen_triton.kernels.candidates import (
    INTERPRETED,
    KERNELS,
    TILES,
    TILES_FP32,
    TILES_ODD,
    Tile,
)
from moegen_triton.kernels.chips import CHIPS, chip_of, generation
from moegen_triton.kernels.costs import permutes, row_tiles, seconds, touched, work_of
from moegen_triton.kernels.measured import Measured, Row, bucket, read, text
from moegen_triton.kernels.tiles import choose, choose_for, pinned, predict
from moegen_triton.launches import LAUNCHES

BF16, CUDA = torch.bfloat16, torch.device("cuda", 0)
H100 = CHIPS[90]
#: T, K, E, d, n of layers whose floors are known, and the floors in milliseconds of a pass
#: forward and of both, at 800 TFLOP/s and 3.0 TB/s.
FLOORS = [
    ((32768, 8, 128, 2048, 768), 3.09, 9.28),
    ((4096, 8, 128, 2048, 768), 0.41, 1.27),
    ((32768, 8, 64, 2048, 1024), 4.12, 12.4),
    ((8192, 2, 8, 4096, 14336), 7.22, 21.7),
    ((8192, 8, 256, 7168, 2048), 7.59, 22.9),
]


def all_tiles() -> list[tuple[int, str, Tile]]:
    tables = [*TILES.items(), (0, TILES_FP32), (0, TILES_ODD)]
    return [(c, name, tile) for c, rows in tables for name in rows for tile in rows[name]]


def test_every_generation_has_tiles_of_every_kernel() -> None:
    assert set(TILES) == set(CHIPS) == {80, 89, 90, 100, 120}
    for table in (*TILES.values(), TILES_FP32, TILES_ODD):
        assert set(table) == set(KERNELS)
        assert all(len(set(rows)) == len(rows) > 0 for rows in table.values())


@pytest.mark.parametrize(("capability", "kernel", "tile"), all_tiles())
def test_tiles_are_what_triton_takes(capability: int, kernel: str, tile: Tile) -> None:
    for size in tile[:4]:
        assert math.log2(size) % 1 == 0
    assert min(tile.m, tile.n, tile.k) >= 16
    assert tile.n % (16 * tile.sub) == 0
    if capability < 90:
        assert not any((tile.weights_tma, tile.rows_tma, tile.specialized))


@pytest.mark.parametrize(
    ("capability", "nearest"),
    [(80, 80), (86, 89), (87, 80), (89, 89), (90, 90), (100, 100), (103, 100), (121, 120)],
)
def test_chips_use_the_tiles_of_the_generation_that_can(capability: int, nearest: int) -> None:
    assert generation(capability) == nearest


def test_on_cpu_tiles_are_small() -> None:
    shape = (100, 4, 64, 32, torch.float32, torch.device("cpu"))
    assert {choose(kernel, *shape) for kernel in KERNELS} == {INTERPRETED}


def test_a_pinned_tile_is_chosen_until_it_is_pinned_no_more() -> None:
    shape = (100, 4, 64, 32, torch.float32, torch.device("cpu"))
    first, second = Tile(32, 32, 32), Tile(64, 64, 64)
    with pinned(up=first):
        with pinned(up=second, down=second):
            assert choose("up", *shape) == choose("down", *shape) == second
        assert choose("up", *shape) == first
        assert choose("down", *shape) == INTERPRETED
    assert choose("up", *shape) == INTERPRETED


@pytest.mark.parametrize("mean", [0.3, 2.0, 16.0, 100.0, 128.0, 700.0])
@pytest.mark.parametrize("m", [16, 64, 128])
def test_tiles_of_rows_are_counted_as_chance_has_it(m: int, mean: float) -> None:
    experts, draws = 64, 200
    rows = round(experts * mean)
    fallen = torch.randint(experts, (draws, rows), generator=torch.manual_seed(0))
    counts = torch.nn.functional.one_hot(fallen, experts).sum(1)
    assert row_tiles(rows, experts, m) == pytest.approx(
        float((-(-counts // m)).sum() / draws), rel=0.03
    )
    assert touched(rows, experts) == pytest.approx(float((counts > 0).sum() / draws), rel=0.03)


def test_no_rows_have_no_tiles() -> None:
    assert row_tiles(0, 8, 64) == row_tiles(0, 0, 64) == touched(0, 0) == 0


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("kernel", ["up", "down", "hidden_gradient", "input_gradient"])
def test_row_tiles_are_as_high_as_experts_have_rows(chip: chips.Chip, kernel: str) -> None:
    heights = [
        choose_for(chip, kernel, rows, 128, 2048, 768, BF16).m
        for rows in (8, 128, 128 * 8, 128 * 64, 128 * 1024)
    ]
    assert heights[0] == heights[1] == 16
    assert heights[-1] >= 64
    assert heights == sorted(heights)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_choices_come_from_the_table_of_the_chip_and_the_format(
    chip: chips.Chip, kernel: str
) -> None:
    assert choose_for(chip, kernel, 4096, 64, 2048, 768, BF16) in TILES[chip.capability][kernel]
    assert choose_for(chip, kernel, 4096, 64, 2048, 768, torch.float32) in TILES_FP32[kernel]
    assert choose_for(chip, kernel, 4096, 64, 2047, 768, BF16) in TILES_ODD[kernel]
    assert choose_for(chip, kernel, 0, 64, 2048, 768, BF16) in TILES[chip.capability][kernel]


@pytest.mark.parametrize(("layer", "forward", "both"), FLOORS)
def test_predictions_are_above_what_is_possible_and_near_it(
    layer: tuple[int, int, int, int, int], forward: float, both: float
) -> None:
    found = predict(H100, *layer)
    assert forward < 1e3 * sum(found.forward.values()) < 2 * forward
    assert both < 1e3 * found.total < 2.2 * both
    inference = predict(H100, *layer, training=False)
    assert not inference.backward
    assert inference.total < (1 + 1e-9) * sum(found.forward.values())


def test_a_token_costs_reading_the_experts_that_it_uses() -> None:
    found = predict(H100, 1, 8, 128, 2048, 768, training=False)
    weights = 8 * 3 * 2048 * 768 * 2 / H100.bandwidth
    assert weights < found.forward["up"] + found.forward["down"] < 2 * weights
    every = predict(H100, 512, 8, 128, 2048, 768, training=False)
    assert every.forward["up"] > 10 * found.forward["up"]


def test_plain_experts_cost_less_than_gated_ones() -> None:
    shape = (H100, 8192, 8, 64, 2048, 1024)
    gated, plain = predict(*shape), predict(*shape, gated=False)
    assert plain.forward["up"] < gated.forward["up"]
    assert plain.backward["input_gradient"] < gated.backward["input_gradient"]


def test_more_work_takes_longer() -> None:
    for kernel in KERNELS:
        tile = TILES[90][kernel][-1]
        times = [
            seconds(kernel, tile, work_of(kernel, rows, 64, 2048, 768), 2, H100)
            for rows in (0, 1, 1000, 30_000, 900_000)
        ]
        assert times == sorted(times)
        assert times[0] == H100.launch


@pytest.mark.parametrize(("n", "wanted"), [(256, False), (768, False), (2048, False)])
def test_rows_of_narrow_experts_are_gathered(n: int, wanted: bool) -> None:
    assert permutes(n, H100) is wanted


def test_rows_of_wide_experts_are_copied_where_products_cost_most() -> None:
    assert permutes(14336, H100)
    assert permutes(14336, CHIPS[100])
    assert not permutes(14336, CHIPS[80])  # which has no TMA
    assert not permutes(14336, H100, rows_of_expert=8)  # weights take longest


def seen(name: str = "NVIDIA H100 PCIe", major: int = 9, minor: int = 0, **more: Any) -> Any:
    facts = {"name": name, "major": major, "minor": minor, "multi_processor_count": 114}
    return SimpleNamespace(**facts | more)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a GPU be seen, with given properties."""

    def see(**facts: Any) -> None:
        chip_of.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: seen(**facts))

    for cached in (chip_of, tiles._measured, tiles._chosen):
        monkeypatch.setattr(cached, "cache_clear", cached.cache_clear)
    yield see
    for cached in (chip_of, tiles._measured, tiles._chosen):
        cached.cache_clear()


def test_a_chip_is_read_off_its_device(device: Any) -> None:
    device(
        memory_bus_width=5120,
        memory_clock_rate=1_593_000,
        shared_memory_per_block_optin=232_448,
        L2_cache_size=52_428_800,
    )
    chip = chip_of(CUDA)
    assert (chip.name, chip.capability, chip.processors) == ("NVIDIA H100 PCIe", 90, 114)
    assert chip.flops == pytest.approx(H100.flops * 114 / 132)
    assert chip.bandwidth == pytest.approx(2.039e12 * chips.ATTAINABLE_BANDWIDTH, rel=1e-3)
    assert (chip.shared, chip.cache) == (232_448, 52_428_800)


def test_a_chip_that_says_little_is_like_others_of_its_generation(device: Any) -> None:
    device(name="NVIDIA GeForce RTX 4090", minor=9, major=8, multi_processor_count=128)
    chip = chip_of(CUDA)
    assert chip.bandwidth == CHIPS[89].bandwidth
    # 165 TFLOP/s by the datasheet; of the L40S' 362, GeForce cards have half.
    assert chip.flops / chips.ATTAINABLE_FLOPS == pytest.approx(165e12, rel=0.03)


def row(kernel: str = "up", rows: int = 4096, **changes: Any) -> Row:
    made = Row(kernel, "bfloat16", rows, 8, 512, 256, Tile(64, 32, 32, 4, 2), 12.5)
    return made._replace(**changes)


def measured(*rows: Row, device: str = "NVIDIA H100 PCIe") -> Measured:
    return Measured(device, {"torch": "2.11.0", "triton": "3.6.0"}, rows)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = measured(row(), row("down", tile=Tile(128, 256, 64, 8, 3, weights_tma=True)))
    tune.write(table, tmp_path / "tiles.json")
    assert read(tmp_path / "tiles.json") == table
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]


def test_a_table_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tiles.json"
    tune.write(measured(row()), out)
    before = out.read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        tune.write(measured(row(), row("down")), out)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]


def test_a_table_is_asked_for_about_as_many_rows() -> None:
    few, many = row(rows=1000), row(rows=60_000, tile=Tile(128, 64, 64))
    table = measured(few, many)

    def find(rows: int, **shape: Any) -> Tile | None:
        asked = {"kernel": "up", "experts": 8, "d": 512, "n": 256, "dtype": "bfloat16"}
        return table.find(rows=rows, **asked | shape)

    assert find(1000) == find(1500) == find(600) == few.tile
    assert find(60_000) == find(100_000) == many.tile
    assert find(10_000) is find(10) is find(0) is None
    for other in ({"kernel": "down"}, {"experts": 16}, {"n": 128}, {"dtype": "float16"}):
        assert find(1000, **other) is None
    assert [bucket(rows) for rows in (0, 1, 2, 1000, 1024, 1500)] == [-1, 0, 1, 10, 10, 11]


BROKEN = {
    "no JSON": "{",
    "a list": "[]",
    "another format": '{"format": 2, "device": "x", "versions": {}, "rows": []}',
    "no device": '{"format": 1, "versions": {}, "rows": []}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_table_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tiles\.json is no table of tiles .*moegen tune"):
        read(path)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        ("kernel", "sideways", "kernel 'sideways' is unknown"),
        ("rows", "many", "whole numbers above 0"),
        ("d", 0, "whole numbers above 0"),
        ("colour", 1, "colour"),
        ("tile", {"m": 48, "n": 64, "k": 64}, "m of a tile is 48"),
        ("tile", {"m": 64, "n": 64, "k": 64.0}, "k of a tile is 64.0"),
        ("tile", {"m": 64, "n": 64, "k": 64, "stages": 0}, "stages of a tile is 0"),
        ("tile", {"m": 64, "n": 64}, "k"),
        ("tile", None, "mapping"),
    ],
)
def test_a_broken_row_is_refused(at: str, value: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    data = json.loads(text(measured(row())))
    data["rows"][0][at] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=said):
        read(path)


def test_what_was_measured_here_goes_before_the_model(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device()
    monkeypatch.setattr(tiles, "INTERPRET", False)
    monkeypatch.setattr(tiles, "MEASURED", tmp_path / "tiles.json")
    shape = (4096, 8, 512, 256, BF16, CUDA)
    by_model = choose("up", *shape)
    assert by_model in TILES[90]["up"]
    for cached in (tiles._measured, tiles._chosen):
        cached.cache_clear()
    tune.write(measured(row()), tmp_path / "tiles.json")
    assert choose("up", *shape) == row().tile != by_model
    assert choose("down", *shape) in TILES[90]["down"]


def test_what_was_measured_elsewhere_is_left_out_and_said(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device()
    monkeypatch.setattr(tiles, "INTERPRET", False)
    monkeypatch.setattr(tiles, "MEASURED", tmp_path / "tiles.json")
    tune.write(measured(row(), device="NVIDIA A100"), tmp_path / "tiles.json")
    shape = (4096, 8, 512, 256, BF16, CUDA)
    with pytest.warns(UserWarning, match="measured on NVIDIA A100, and this is NVIDIA H100"):
        found = choose("up", *shape)
    assert found in TILES[90]["up"]
    assert choose("down", *shape) in TILES[90]["down"]  # and not said twice


def test_without_a_gpu_nothing_is_measured_or_written(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(tune.NoGpuError, match="torch sees none here"):
        tune.tune([tune.Layer()], tmp_path / "tiles.json")
    assert not list(tmp_path.iterdir())


def test_the_fastest_tiles_and_their_variations_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the clock: deep pipelines and no TMA for weights are fastest."""

    def clock(launch: Any, kernel: str, tile: Tile, flush: Any) -> float:
        if kernel == "hidden_gradient":
            return math.inf  # as if nothing compiled
        return 1e-3 / tile.m - 1e-7 * tile.stages + 1e-7 * tile.weights_tma

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "chip_of", lambda device: H100)
    monkeypatch.setattr(tune, "_larger_than_caches", lambda chip, device: None)
    monkeypatch.setattr(tune, "_time", clock)
    ways = {kernel: dict.fromkeys(made, lambda x: None) for kernel, made in LAUNCHES.items()}
    monkeypatch.setattr(tune, "LAUNCHES", ways)
    layers = [tune.Layer(512, 4, 16, 256, 128), tune.Layer(64, 4, 16, 256, 128)]
    bar = Progress(console=Console(quiet=True))
    table = tune.tune(layers, tmp_path / "tiles.json", bar)
    assert table == read(tmp_path / "tiles.json")
    assert bar.finished
    found = {(row.kernel, row.rows, row.d, row.n) for row in table.rows}
    assert len(found) == len(table.rows) == 10
    assert {name for name, *_ in found} == set(KERNELS) - {"hidden_gradient"}
    assert ("input_gradient", 2048, 256, 256) in found  # whose sum is over gate and up
    assert {row[2:] for row in found if row[0] == "weight_gradient"} == {(256, 128), (256, 256)}
    assert all(row.tile.m == 128 and row.predicted > 0 for row in table.rows)
    best = {row.kernel: row.tile for row in table.rows}
    assert not best["down"].weights_tma  # found among variations


def test_new_measurements_replace_those_of_the_same_sizes_alone(tmp_path: Path) -> None:
    out = tmp_path / "tiles.json"
    assert tune.merged(out, "A", [row()]) == (row(),)
    kept, old, new = row("down"), row(microseconds=9.0), row(microseconds=7.0)
    tune.write(measured(kept, old, device="A"), out)
    assert tune.merged(out, "A", [new]) == (kept, new)
    assert tune.merged(out, "B", [new]) == (new,)


def test_variations_of_a_tile_are_all_different() -> None:
    for _, _, tile in all_tiles():
        found = list(tune.variations(tile))
        assert len({*found, tile}) == len(found) + 1
        assert all(one.stages >= 1 and math.log2(one.group) % 1 == 0 for one in found)
