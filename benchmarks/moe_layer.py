"""Measures a routed layer: moegen's variants beside other implementations and dense products.

Run from the repository root as `python -m benchmarks.moe_layer`, on a GPU; `--cpu` compares the
eager backend on the CPU, `--tiny` runs everything once, small, with Triton's interpreter. Every
variant is compared with a reference in float64 before anything is timed. Writes JSON after every
workload, and at the end a page of tables and a plot.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click
import torch

from benchmarks.layer import aims
from benchmarks.layer.measure import TRAINING, Options, make_case
from benchmarks.layer.peers import GROUPED_MM, PEERS
from benchmarks.layer.plot import plot
from benchmarks.layer.predict import kernels_page, predictions
from benchmarks.layer.record import Case, Run, machine, read
from benchmarks.layer.report import page, section
from benchmarks.layer.shapes import (
    BY_NAME,
    CPU_LAYERS,
    DTYPES,
    LAYERS,
    ROUTINGS,
    TINY_LAYERS,
    Workload,
    workload,
)
from benchmarks.layer.timing import device_rates
from benchmarks.layer.tuned import source_of_tiles, tune
from benchmarks.layer.variants import EAGER, OURS, Variant, compiled

RESULTS = Path(__file__).resolve().parent / "results"


def all_variants(mode: str, compile_too: bool) -> list[Variant]:
    """Of a mode, ours first. Tiny ones are compiled without Inductor, which would take minutes."""
    if mode == "cpu":
        names = ("torch", "transformers")
        return [EAGER, OURS[1], *(peer for peer in PEERS if peer.family in names)]
    backend = "aot_eager" if mode == "tiny" else None
    ours, torchs = (
        compiled(EAGER, backend=backend),
        compiled(GROUPED_MM, backend=backend, only_bf16=True),
    )
    more = [ours, torchs] if compile_too else []
    return [*OURS, *more, *PEERS]


def chosen_variants(
    found: list[Variant], only: tuple[str, ...], without: tuple[str, ...]
) -> list[Variant]:
    """Those whose names hold one of the words, if words are given, and none of the unwanted."""

    def named(variant: Variant, words: tuple[str, ...]) -> bool:
        return any(word.lower() in variant.name.lower() for word in words)

    return [v for v in found if (not only or named(v, only)) and not named(v, without)]


def chosen_work(
    mode: str,
    shapes: tuple[str, ...],
    tokens: tuple[int, ...],
    dtypes: tuple[str, ...],
    routings: tuple[str, ...],
    for_aims: bool,
) -> list[Workload]:
    """The workloads: those asked for, those of the aims, or all of a mode."""
    if for_aims and mode == "gpu" and not shapes:
        pairs = [(BY_NAME[name], count) for name, count in aims.CASES]
    else:
        layers = {"gpu": LAYERS, "cpu": CPU_LAYERS, "tiny": TINY_LAYERS}[mode]
        if shapes:
            layers = tuple(BY_NAME[name] for name in shapes)
        pairs = [(layer, count) for layer in layers for count in (tokens or layer.tokens)]
    usual = {"gpu": ("bf16",), "cpu": ("bf16", "fp32"), "tiny": ("fp32",)}[mode]
    return [
        workload(layer, count, dtype, routing)
        for dtype in (dtypes or usual)
        for routing in (routings or ("random",))
        for layer, count in pairs
    ]


def choose_device(mode: str) -> torch.device:
    """A GPU unless the mode is of the CPU; the interpreter where Triton shall run on it."""
    if mode == "gpu":
        if not torch.cuda.is_available():
            raise click.ClickException("no GPU was found: --cpu and --tiny need none")
        return torch.device("cuda", torch.cuda.current_device())
    if mode == "tiny":
        # Both are read when the packages are imported, which making variants does.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "0"
    return torch.device("cpu")


def show(run: Run, *, with_aims: bool, with_predictions: bool) -> str:
    """What is printed after all cases."""
    parts = []
    if with_predictions:
        parts.append(predictions(run))
    if with_aims:
        parts.append(aims.aims_page(run))
    return "\n\n".join(parts)


def write(run: Run, out: Path, name: str, extra: str) -> None:
    """JSON, page and plot."""
    run.write(out / f"{name}.json")
    kernels = [kernels_page(case) for case in run.cases]
    whole = [page(run), *(k for k in kernels if k), *([extra] if extra else [])]
    (out / f"{name}.md").write_text("\n\n".join(part.strip() for part in whole) + "\n")
    plot(run, out / f"{name}.png")


def measure(
    run: Run,
    works: list[Workload],
    variants: list[Variant],
    device: torch.device,
    options: Options,
    record: Path | None,
) -> list[Case]:
    """Each workload in turn; what one measured is printed and written before the next begins."""
    for number, work in enumerate(works, 1):
        click.echo(f"[{number}/{len(works)}] {work.title}", err=True)
        try:
            case = make_case(work, variants, device, options, run.absent)
        except torch.OutOfMemoryError as problem:
            click.echo(f"left out: {str(problem).splitlines()[0]}", err=True)
            continue
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        run.cases.append(case)
        click.echo(section(case, run.machine) + "\n")
        if record is not None:
            run.write(record)
    return run.cases


@click.command(help=__doc__)
@click.option("--cpu", "mode", flag_value="cpu", help="The eager backend on the CPU.")
@click.option("--tiny", "mode", flag_value="tiny", help="Everything, small, interpreted.")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(BY_NAME)))
@click.option("--tokens", multiple=True, type=click.IntRange(min=1))
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)))
@click.option("--routing", "routings", multiple=True, type=click.Choice(ROUTINGS))
@click.option("--variant", "only", multiple=True, help="Only variants whose names hold this.")
@click.option("--without", multiple=True, help="No variant whose name holds this.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice([*TRAINING, "graph"]))
@click.option("--compile/--no-compile", "compile_too", default=True, help="torch.compile too.")
@click.option("--seconds", default=3.0, help="For a kind of step of a workload.")
@click.option("--aims", "for_aims", is_flag=True, help="The aims' workloads, and what is met.")
@click.option("--predict", "with_predictions", is_flag=True, help="Predicted beside measured.")
@click.option("--tune", "tune_first", is_flag=True, help="Measure tiles first, and use them.")
@click.option(
    "--own-time",
    is_flag=True,
    help="On a CPU that does other work too: the process's own time. Best with one thread.",
)
@click.option("--profile", is_flag=True, help="Times by kernel.")
@click.option(
    "--from",
    "sources",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Measure nothing: merge these JSON files and write page and plot anew.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where to write.")
@click.option("--name", help="Of the files, without suffix.")
def main(
    mode: str | None,
    shapes: tuple[str, ...],
    tokens: tuple[int, ...],
    dtypes: tuple[str, ...],
    routings: tuple[str, ...],
    only: tuple[str, ...],
    without: tuple[str, ...],
    kinds: tuple[str, ...],
    compile_too: bool,
    seconds: float,
    for_aims: bool,
    with_predictions: bool,
    tune_first: bool,
    own_time: bool,
    profile: bool,
    sources: tuple[Path, ...],
    out: Path | None,
    name: str | None,
) -> None:
    mode = mode or "gpu"
    name = name or {"gpu": "moe_layer", "cpu": "moe_layer_cpu", "tiny": "moe_layer_tiny"}[mode]
    if out is None and mode != "tiny":
        out = RESULTS
    if sources:
        run = read(list(sources))
    else:
        device = choose_device(mode)
        usual = {
            "gpu": (*TRAINING, "graph"),
            "cpu": ("inference", "both", "routed both"),
            "tiny": ("inference", "forward", "both", "routed both"),
        }
        options = Options(
            0.0 if mode == "tiny" else seconds,
            kinds or usual[mode],
            *((1, 1) if mode == "tiny" else (Options.least, Options.most)),
            dense=mode != "tiny",
            profile=profile,
            own_time=own_time,
        )
        command = shlex.join(["python", "-m", "benchmarks.moe_layer", *sys.argv[1:]])
        run = Run(machine(device), [command])
        if own_time and mode == "cpu":
            run.machine["clock"] = "the process's own time"
        run.machine["rates"] = device_rates(device)
        variants = chosen_variants(all_variants(mode, compile_too), only, without)
        works = chosen_work(mode, shapes, tokens, dtypes, routings, for_aims)
        if tune_first:
            click.echo(tune(works), err=True)
        if mode != "cpu":
            run.machine["tiles"] = source_of_tiles()
        record = out / f"{name}.json" if out is not None else None
        measure(run, works, variants, device, options, record)
    extra = show(run, with_aims=for_aims, with_predictions=with_predictions)
    click.echo(extra)
    for variant, why in run.absent.items():
        click.echo(f"absent: {variant}: {why}", err=True)
    if out is not None:
        write(run, out, name, extra)
    if not run.cases:
        raise click.ClickException("nothing was measured")


if __name__ == "__main__":
    main()
