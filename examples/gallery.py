"""Writes the gallery: a page for each system with its spec, picture, numbers and training.

Run from the repository root as `python -m examples.gallery`. It reads docs/gallery/systems.yaml,
the specs, and the results that examples left below docs/gallery; nothing is trained here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import yaml

import moegen
from moegen.draw import FORMATS
from moegen.emit.files import put
from moegen.parameters import count
from moegen.planner import Plan
from moegen.report import numbers
from moegen.report.picture import of_plan
from moegen.report.published import published
from moegen.report.screen import progress_bar

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "docs" / "gallery"
SPECS = ROOT / "specs"
SHORT = 128  # tokens that pictures and counts are planned for: neither depends on them


@dataclass(frozen=True)
class System:
    """An entry of systems.yaml.

    specs: names of specs, the one that is shown first; example: the module below examples/ that
    trained it, or None; lesson: one paragraph on what it taught the field; year: where no spec
    says it, since experts need not be networks.
    """

    name: str
    title: str
    lesson: str
    specs: tuple[str, ...] = ()
    example: str | None = None
    year: int | None = None


def systems() -> list[System]:
    """All entries, in the order of the index."""
    entries = yaml.safe_load((GALLERY / "systems.yaml").read_text("utf-8"))
    return [System(**{**entry, "specs": tuple(entry.get("specs", ()))}) for entry in entries]


def page(system: System) -> str:
    """The page of a system, in Markdown."""
    parts = [f"# {system.title}", system.lesson.strip(), *_specified(system), *_trained(system)]
    return "\n\n".join(parts) + "\n"


def _specified(system: System) -> Iterator[str]:
    """The spec, the model that it makes, and its numbers."""
    if not system.specs:
        return
    name = system.specs[0]
    first = planned(name)
    yield f"*{_from(first)}*"
    yield "## The spec"
    for index, file in enumerate(moegen.load(SPECS / f"{name}.yaml").files):
        place = Path(file).name
        before = "which extends " if index else ""
        yield f"{before}[`specs/{place}`](../../../specs/{place})"
        yield f"```yaml\n{(SPECS / place).read_text('utf-8').strip()}\n```"
    yield f"```console\nmoegen build specs/{name}.yaml\n```"
    yield "## The model"
    yield f"```mermaid\n{FORMATS['mermaid'](of_plan(first)).strip()}\n```"
    yield "## Its numbers"
    yield _table(system.specs)


def index(found: Sequence[System]) -> str:
    """The page that lists the others."""
    rows = []
    for system in found:
        spec = planned(system.specs[0]).spec if system.specs else None
        year, kind = (spec.year, spec.model.kind) if spec else (system.year, "no networks")
        trained = "yes" if system.example else ""
        rows.append(f"| {year} | [{system.title}]({system.name}/README.md) | {kind} | {trained} |")
    head = [
        "# Gallery",
        "",
        "Every system of the literature that moegen has a spec of: the spec, the model that it "
        "makes, its numbers beside the published ones, and, where an example trained it on real "
        "data, what was seen beside what the paper claims. `python -m examples.gallery` writes "
        "these pages.",
        "",
        "| year | system | kind | trained |",
        "|--:|:--|:--|:--|",
    ]
    return "\n".join([*head, *rows]) + "\n"


@cache
def planned(name: str) -> Plan:
    """The plan of a spec for a short input."""
    loaded = moegen.load(SPECS / f"{name}.yaml")
    tokens = loaded.spec.model.unit == "token"
    return moegen.plan(loaded, batch=1, sequence=SHORT if tokens else None)


def results(system: System) -> dict[str, Any] | None:
    """What the system's example left, if it has one."""
    if system.example is None:
        return None
    text = (GALLERY / system.example / "results.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _from(plan: Plan) -> str:
    spec = plan.spec
    source, year = spec.source or "", str(spec.year or "")
    return source if year in source else f"{source}, {year}".removeprefix(", ")


# Numbers


def _table(names: Sequence[str]) -> str:
    """Parameters and FLOPs of specs, beside what their authors print."""
    unit = planned(names[0]).spec.model.unit
    lines = [
        f"| spec | parameters | published | active | published | FLOPs forward per {unit} |",
        "|:--|--:|--:|--:|--:|--:|",
        *map(_row, names),
    ]
    notes = [f"`{name}`: {note}" for name in names if (note := _note(planned(name)))]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def _row(name: str) -> str:
    plan = planned(name)
    counts = count(plan.root, plan.spec.model.tied)
    figures = published(plan.data, counts)
    printed = {one.name: one.printed for one in figures.figures} if figures else {}
    active = {one.name: one.counted for one in figures.figures} if figures else {}
    cells = (
        f"`{name}`",
        numbers.exact(counts.total),
        printed.get("total", "-"),
        numbers.exact(active.get("active", counts.active)),
        printed.get("active", "-"),
        numbers.flops(moegen.estimate(plan).forward_flops),
    )
    return f"| {' | '.join(cells)} |"


def _note(plan: Plan) -> str | None:
    figures = published(plan.data, count(plan.root, plan.spec.model.tied))
    return figures.note if figures else None


# Training


def _trained(system: System) -> Iterator[str]:
    """What the example saw: held-out results, claims, curves and loads."""
    found = results(system)
    if found is None:
        return
    yield "## Trained on real data"
    yield f"```console\npython -m examples.{system.example}\n```"
    yield str(found["data"])
    yield _held_out(found["runs"])
    yield _claims(found["claims"])
    for picture in sorted((GALLERY / str(system.example)).glob("*.png")):
        place = "" if system.example == system.name else f"../{system.example}/"
        yield f"![{picture.stem}]({place}{picture.name})"


def _held_out(runs: Sequence[Mapping[str, Any]]) -> str:
    """The last measures of every system on rows held out, means over seeds."""
    by_name: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        by_name.setdefault((run["on"], run["system"]), []).append(run)
    measures = list(dict.fromkeys(name for run in runs for name in _last(run)))
    lines = [
        f"| system | parameters | active | seeds | {' | '.join(measures)} |",
        f"|:--|--:|--:|--:|{'--:|' * len(measures)}",
    ]
    for (on, name), same in by_name.items():
        values = (_mean([_last(run).get(measure) for run in same]) for measure in measures)
        sizes = (_exact(same[0][key]) for key in ("parameters", "active"))
        title = f"{on}: {name}" if on else name
        lines.append(f"| {' | '.join([title, *sizes, str(len(same)), *values])} |")
    return "\n".join(lines)


def _last(run: Mapping[str, Any]) -> dict[str, float]:
    return run["held_out"][-1][1] if run["held_out"] else {}


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.4g}" if known else "-"


def _exact(value: int | None) -> str:
    return "-" if value is None else numbers.exact(value)


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    holds = {True: "yes", False: "no", None: "open"}
    rows = [f"| {c['paper']} | {c['seen']} | {holds[c['holds']]} |" for c in claims]
    return "\n".join(["| the paper claims | here was seen | holds |", "|:--|:--|:--|", *rows])


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail where a page is out of date.")
def main(check: bool) -> None:
    """Write docs/gallery from systems.yaml, the specs and the examples' results."""
    found = systems()
    pages = {GALLERY / "README.md": index(found)}
    with progress_bar() as bar:
        task = bar.add_task("", total=len(found))
        for system in found:
            pages[GALLERY / system.name / "README.md"] = page(system)
            bar.advance(task)
    old = [p for p, text in pages.items() if not p.is_file() or p.read_text("utf-8") != text]
    for place in old:
        click.echo(f"{'out of date' if check else 'wrote'}: {place.relative_to(ROOT)}")
        if not check:
            place.parent.mkdir(parents=True, exist_ok=True)
            put(place, pages[place])
    if check and old:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
