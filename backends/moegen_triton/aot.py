"""Compile every tile of the kernels' tables for chips that need not be there.

`python -m moegen_triton.aot` prints what each takes and what is wrong with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moegen_triton.compiling import (
    Compiled,
    Resources,
    compiling,
    narrow_offsets,
    problems,
    resources,
)
from moegen_triton.kernels.candidates import (
    INTERPRETED,
    KERNELS,
    TILES,
    TILES_FP32,
    TILES_ODD,
    Tile,
)
from moegen_triton.kernels.tiles import pinned
from moegen_triton.launches import LAUNCHES, OTHERS, Layer

#: The ways of launching a kernel that each of its tiles must compile for: those with most
#: to hold in registers.
VARIANTS = {
    "up": ("bias",),
    "down": ("bias",),
    "hidden_gradient": ("bias",),
    "input_gradient": ("rows",),
    "weight_gradient": ("bias", "right"),
}


#: Experts of the kernels that sort and choose: as many as large models have.
MANY = 256


class Case(NamedTuple):
    """One tile of a kernel in one way of launching it, for one generation of chips."""

    capability: int
    kernel: str
    variant: str
    dtype: str
    tile: Tile
    #: What widths have beyond a multiple of 16.
    more: int = 0
    activation: str = "clamped_swiglu"


class Result(NamedTuple):
    """What became of a case: what its kernels take, and what is wrong."""

    case: Case
    resources: tuple[Resources, ...]
    problems: tuple[str, ...]


#: What kernels are called that have no table of tiles; their cases are the launches.
OTHER = "other"
#: How the function with a kernel's products is called.
MAIN = {kernel: f"{kernel}_kernel" for kernel in KERNELS} | {"input_gradient": "down_kernel"}


def cases(capability: int) -> Iterator[Case]:
    """Yield the cases of every row of the tables for a generation of chips."""
    for kernel in KERNELS:
        for tile in TILES[capability][kernel]:
            for variant in VARIANTS[kernel]:
                yield Case(capability, kernel, variant, "bfloat16", tile)
        for tile in TILES_FP32[kernel]:
            yield Case(capability, kernel, VARIANTS[kernel][-1], "float32", tile)
        for tile in TILES_ODD[kernel]:
            yield Case(capability, kernel, VARIANTS[kernel][-1], "bfloat16", tile, more=1)
    tile = TILES[capability]["up"][-1]
    yield Case(capability, "up", "gathered", "float16", tile, activation="geglu")
    for launch in OTHERS:
        yield Case(capability, OTHER, launch, "bfloat16", INTERPRETED)


def compile_case(case: Case) -> Result:
    """Compile a case; what goes wrong is among the problems."""
    try:
        compiled = _compiled(case)
    except Exception as error:  # whatever Triton or ptxas refuse is the answer
        said = str(error).strip().splitlines() or [""]
        return Result(case, (), (f"{type(error).__name__}: {said[0]}",))
    found, wrong = [], []
    for one in {id(launched.kernel): launched for launched in compiled}.values():
        taken = resources(one)
        products = taken.function == MAIN.get(case.kernel) and case.dtype != "float32"
        told = problems(taken, case.capability, products, case.tile.m)
        told += [f"an address by a 32-bit product: {line}" for line in narrow_offsets(one.ir)]
        wrong += [f"{taken.function}: {sentence}" for sentence in told]
        found.append(taken)
    return Result(case, tuple(found), tuple(wrong))


def _compiled(case: Case) -> list[Compiled]:
    dtype = getattr(torch, case.dtype)
    plain = Layer(dtype=dtype, activation=case.activation)
    layer = plain._replace(d=plain.d + case.more, n=plain.n + case.more)
    if case.kernel == OTHER:
        launch = OTHERS[case.variant](layer._replace(experts=MANY, choices=8))
        with compiling(case.capability) as compiled:
            launch()
        return compiled
    launch = LAUNCHES[case.kernel][case.variant](layer)
    with compiling(case.capability) as compiled, pinned(**{case.kernel: case.tile}):
        launch()
    return compiled


def compile_all(
    wanted: Iterable[Case], processes: int, done: Callable[[Result], None]
) -> list[Result]:
    """Compile cases in so many processes, telling each as it is done."""
    listed = list(wanted)
    found: dict[Case, Result] = {}
    if processes == 1:
        for case in listed:
            found[case] = compile_case(case)
            done(found[case])
        return [found[case] for case in listed]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(compile_case, case) for case in listed]):
            result = future.result()
            found[result.case] = result
            done(result)
    return [found[case] for case in listed]


def as_data(result: Result) -> dict[str, Any]:
    """Return a result as plain data."""
    case = result.case._asdict() | {"tile": result.case.tile._asdict()}
    taken = [one._asdict() for one in result.resources]
    return {**case, "resources": taken, "problems": list(result.problems)}


def _shown(tile: Tile) -> str:
    marks = [f"sub {tile.sub}"] if tile.sub > 1 else []
    marks += ["TMA weights"] if tile.weights_tma else []
    marks += ["TMA rows"] if tile.rows_tma else []
    marks += ["specialized"] if tile.specialized else []
    size = f"{tile.m}x{tile.n}x{tile.k}, {tile.warps} warps, {tile.stages} stages"
    return ", ".join([size, *marks])


def table(results: Iterable[Result]) -> Table:
    """Lay results out, a row for each kernel with products and each without a table."""
    drawn = Table("sm", "kernel", "launch", "tile", "regs", "KiB", "tensor", "s", "wrong")
    for case, taken, wrong in results:
        odd = " (odd widths)" if case.more else ""
        named = f"{case.variant}{odd} {case.dtype}"
        tile, told = _shown(case.tile), "; ".join(wrong)
        main = [one for one in taken if one.function == MAIN.get(case.kernel)]
        for one in main or taken:
            tensor = " ".join(f"{count} {name}" for name, count in one.tensor.items())
            figures = [str(one.registers), str(one.shared // 1024), tensor, f"{one.seconds:.1f}"]
            kernel, where = (case.kernel, tile) if main else (one.function, "")
            drawn.add_row(str(case.capability), kernel, named, where, *figures, told)
        if not taken:
            empty = [""] * 4
            drawn.add_row(str(case.capability), case.kernel, named, tile, *empty, told)
    return drawn


@click.command(help="Compile the tiles of all kernels ahead of time; needs no GPU.")
@click.option("--capability", "-c", type=int, multiple=True, help="such as 90; all if none")
@click.option("--kernel", "-k", type=click.Choice([*KERNELS, OTHER]), multiple=True)
@click.option("--jobs", "-j", type=int, default=os.cpu_count() or 1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
def main(capability: tuple[int, ...], kernel: tuple[str, ...], jobs: int, as_json: bool) -> None:
    """Print what every tile takes; the exit code is 1 if anything is wrong."""
    unknown = [one for one in capability if one not in TILES]
    if unknown:
        raise click.BadParameter(f"{unknown[0]} is none of {', '.join(map(str, sorted(TILES)))}")
    wanted = [case for one in capability or sorted(TILES) for case in cases(one)]
    wanted = [case for case in wanted if not kernel or case.kernel in kernel]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("Compiling", total=len(wanted))
        results = compile_all(wanted, jobs, lambda result: progress.advance(bar))
    wrong = sum(bool(result.problems) for result in results)
    if as_json:
        click.echo(json.dumps([as_data(result) for result in results], indent=1))
    else:
        Console().print(table(results))
        click.echo(f"{len(results)} compiled, {wrong} with something wrong")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
