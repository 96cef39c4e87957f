"""Writes what an example found into a folder, and nothing over what somebody else put there.

results.json holds the SHA-256 of each file beside it and of its own contents. So a file that was
edited, or that no example wrote, is known, and is left alone unless it is forced.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.harness import plots
from examples.harness.results import FORMAT, About, Results, by_data, by_name
from examples.plot import DPI
from moegen.emit.files import put
from moegen.errors import MoegenError, Problem

RECORD = "results.json"

# Lists of numbers alone; a string in JSON has no line breaks, so nothing in one is met.
_NUMBERS = re.compile(r"\[\n([^\[\]{}\"]*)\n *\]")


def prepare(folder: Path, force: bool) -> None:
    """Refuse, before any work is done, a folder in which files of others would be replaced."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoegenError(f"cannot make the folder {folder}: {error.strerror}") from error
    foreign = [] if force else _foreign(folder)
    if foreign:
        names = ", ".join(foreign)
        raise MoegenError(
            Problem(
                f"{folder} has {names}, which no example wrote, or which was edited since",
                hint="choose another folder with --out, or --force to replace",
            )
        )


def leave(about: About, setting: Mapping[str, Any], results: Results, folder: Path) -> list[Path]:
    """Write plots and results.json, each whole or not at all; remove older plots of ours."""
    images = drawn(results)
    old = set(_recorded(folder) or {})
    for name in old - set(images) - {RECORD}:
        (folder / name).unlink(missing_ok=True)
    for name, content in images.items():
        _put_bytes(folder / name, content)
    data = results.as_data(about, setting)
    data["files"] = {name: _hash(content) for name, content in images.items()}
    data["sha256"] = _own_hash(data)
    put(
        folder / RECORD,
        _NUMBERS.sub(_on_one_line, json.dumps(data, indent=1, allow_nan=False)) + "\n",
    )
    return [folder / RECORD, *(folder / name for name in images)]


def drawn(results: Results) -> dict[str, bytes]:
    """All plots as PNG by file name: curves, each system's loads (first run), the example's own."""
    figures = {}
    for data, runs in by_data(results.runs).items():
        figures[f"curves-{slug(data)}" if data else "curves"] = plots.curves(runs)
    for name, runs in by_name(results.runs).items():
        figures[f"loads-{slug(name)}"] = plots.heatmap(runs[0])
    figures |= results.figures
    return {f"{name}.png": _png(figure) for name, figure in figures.items() if figure is not None}


def slug(system: str) -> str:
    """A system's name as part of a file's: "Soft MoE, 8 slots" is soft-moe-8-slots."""
    plain = "".join(c if c.isascii() and c.isalnum() else " " for c in system.lower())
    return "-".join(plain.split())


def _foreign(folder: Path) -> list[str]:
    """Names that we might write and whose contents are not what we wrote."""
    known = _recorded(folder) or {}
    there = [*folder.glob("*.png"), *folder.glob(RECORD)]
    return sorted(p.name for p in there if known.get(p.name) != _hash(p.read_bytes()))


def _recorded(folder: Path) -> dict[str, str] | None:
    """Hashes by file name, of results.json too; None if that is missing, foreign or edited."""
    try:
        text = (folder / RECORD).read_bytes()
        data = json.loads(text)
        ours = data["format"] == FORMAT and data["sha256"] == _own_hash(data)
        return {**data["files"], RECORD: _hash(text)} if ours else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _own_hash(data: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return _hash(json.dumps(rest, sort_keys=True).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _on_one_line(found: re.Match[str]) -> str:
    return "[" + " ".join(found[1].split()) + "]"


def _png(figure: Any) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
    return image.getvalue()


def _put_bytes(place: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(place)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
