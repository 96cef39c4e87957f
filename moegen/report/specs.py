"""Lists specs by family: year, kind, parameters, and where the architecture is from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from moegen.choices import choose
from moegen.errors import MoegenError, Problem
from moegen.report import numbers
from moegen.report.screen import note, plain, progress_bar, table
from moegen.spec.source import read
from moegen.spec.words import nearest

OTHERS = "others"  # the family of specs that name none


@dataclass(frozen=True)
class Row:
    """What a list says of a spec; total and active as printed by its authors, or as counted."""

    name: str
    family: str
    year: int | None
    kind: str
    total: str | None
    active: str | None
    source: str | None


def print_specs(screen: Console, family: str | None, *, counted: bool) -> None:
    """A table with a section for each family, the oldest first."""
    folder = spec_folder()
    title = f"{folder}: {'counted' if counted else 'as published'}"
    made = table(title, ("name", "kind", ">year", ">total", ">active", "source"))
    before = None
    for row in _rows(folder, family, counted=counted):
        if row.family != before:
            if before is not None:
                made.add_section()
            made.add_row(plain(row.family), style="bold")
        before = row.family
        cells = (row.kind, row.year, row.total, row.active, row.source)
        texts = ("-" if cell is None else str(cell) for cell in cells)
        made.add_row(plain(f"  {row.name}"), *map(plain, texts))
    screen.print(made)
    said = "both embeddings included" if counted else "as its authors count it"
    note(screen, f"active: parameters that a token uses, {said}.")
    note(screen, "`moegen new NAME --from SPEC` starts a spec of your own.")


def specs_facts(family: str | None, *, counted: bool) -> list[dict[str, Any]]:
    """The rows as JSON."""
    return [asdict(row) for row in _rows(spec_folder(), family, counted=counted)]


def spec_folder() -> Path:
    """./specs, or the specs that come with the package."""
    package = Path(__file__).parents[1]
    for folder in (Path("specs"), package / "specs", package.parent / "specs"):
        if any(folder.glob("*.yaml")):
            return folder
    raise MoegenError("there is no folder ./specs, and no specs come with this installation")


def find_spec(name: str) -> Path:
    """The file of a spec: a path as it is, or the name of one in the folder of specs."""
    if Path(name).is_file():
        return Path(name)
    known = {path.stem: path for path in spec_folder().glob("*.yaml")}
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean {near!r}?" if near else "`moegen specs` lists them"
        raise MoegenError(Problem(f"no spec is called {name!r}, and no file either", hint=hint))
    return known[name]


def _rows(folder: Path, family: str | None, *, counted: bool) -> Iterator[Row]:
    """One row a spec, by family and age."""
    known = [(path, read(path).data) for path in folder.glob("*.yaml")]
    families = {str(data.get("family") or OTHERS) for _, data in known}
    if family is not None:
        choose("family", family, families)
    oldest: dict[str, int] = {}
    for _, data in known:
        name, year = str(data.get("family") or OTHERS), int(data.get("year") or 9999)
        oldest[name] = min(year, oldest.get(name, 9999))
    rows = [_published(path, data) for path, data in known]
    rows = [row for row in rows if family in (None, row.family)]
    rows.sort(key=lambda r: (oldest[r.family], r.family, r.year or 9999, r.name))
    if not counted:
        yield from rows
        return
    with progress_bar() as bar:
        task = bar.add_task("", total=len(rows))
        for row in rows:
            yield _counted(folder, row)
            bar.advance(task)


def _published(path: Path, data: dict[str, Any]) -> Row:
    figures = data.get("published") or {}
    model = data.get("model")
    kind = str(model.get("kind", "decoder")) if isinstance(model, dict) else "-"
    total, active = (figures.get(key) for key in ("total", "active"))
    return Row(
        name=path.stem,
        family=str(data.get("family") or OTHERS),
        year=data.get("year"),
        kind=kind,
        total=None if total is None else str(total),
        active=None if active is None else str(active),
        source=data.get("source"),
    )


def _counted(folder: Path, row: Row) -> Row:
    from dataclasses import replace

    from moegen.api import load
    from moegen.graph.builder import Trace
    from moegen.parameters import count

    spec = load(folder / f"{row.name}.yaml").spec
    counts = count(Trace(spec).root(), spec.model.tied)
    return replace(row, total=numbers.count(counts.total), active=numbers.count(counts.active))
