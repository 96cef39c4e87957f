"""Writes packages to disk, file by file, whole or not at all, and never over a user's edits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from moegen.emit.files import put
from moegen.emit.package import Package
from moegen.errors import PackageError, Problem


def write(package: Package, folder: Path, *, force: bool) -> list[str]:
    """Write a package's files into `folder`; the names of those that changed.

    Refuses a folder that holds something else, and files that were edited since they were
    generated, unless `force`. Touches nothing outside `folder`; plan.json is written last.
    """
    if not force:
        _refuse_foreign(folder)
        _refuse_edited(folder, package)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        order = sorted(package.files, key=lambda name: (name == "plan.json", name))
        stale = _recorded(folder).keys() - package.files.keys()
        for name in order:
            _make_room(folder / name, folder)
        changed = [name for name in order if put(folder / name, package.files[name])]
        for name in sorted(stale):
            _remove(folder / name, folder)
    except OSError as error:
        raise PackageError(f"cannot write to {folder}: {error.strerror or error}") from error
    return changed


def differences(folder: Path, rebuild: Callable[[Path, str], Package]) -> list[str]:
    """Sentences on every file of a package that is not what its spec.yaml gives."""
    made = rebuild(folder / "spec.yaml", backend_of(folder))
    out = []
    for name, text in made.files.items():
        place = folder / name
        if not place.is_file():
            out.append(f"{name} is missing")
        elif place.read_text(encoding="utf-8") != text:
            out.append(f"{name} differs from what the spec gives")
    return out


def backend_of(folder: Path) -> str:
    """The name of the backend that made a package."""
    return str(_facts(folder).get("backend", "eager"))


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise PackageError(f"{folder} is a file; give another place with --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "plan.json").is_file():
        hint = "give another place with --out, or --force to write into it"
        raise PackageError(Problem(f"{folder} holds files that are not a model's", hint=hint))


def _refuse_edited(folder: Path, package: Package) -> None:
    """Refuse if a file is neither what was generated nor, after a failed write, what will be."""
    edited = []
    for name, recorded in _recorded(folder).items():
        place = folder / name
        if not place.is_file() or _hash(place) == recorded:
            continue
        if place.read_bytes() != package.files.get(name, "").encode():
            edited.append(name)
    if edited:
        hint = "keep them by giving another place with --out, or give them up with --force"
        names = ", ".join(edited)
        raise PackageError(Problem(f"edited since they were generated: {names}", hint=hint))


def _recorded(folder: Path) -> Mapping[str, str]:
    """The files of a package with their hashes, as its plan.json tells; nothing if none."""
    if not (folder / "plan.json").is_file():
        return {}
    files = _facts(folder).get("files")
    plain = isinstance(files, dict) and all(map(_is_plain, files))
    return files if isinstance(files, dict) and plain else {}


def _make_room(place: Path, folder: Path) -> None:
    """The folder that a file goes into; a link there is replaced, and not followed."""
    if place.parent != folder and place.parent.is_symlink():
        place.parent.unlink()
    place.parent.mkdir(exist_ok=True)


def _remove(place: Path, folder: Path) -> None:
    """Remove a file that is not needed any more, and the folder that it leaves empty."""
    inner = place.parent
    if inner == folder:
        place.unlink(missing_ok=True)
    elif inner.is_dir() and not inner.is_symlink():
        place.unlink(missing_ok=True)
        if not any(inner.iterdir()):
            inner.rmdir()


def _is_plain(name: str) -> bool:
    """Whether a name in a plan.json is of a file in the package, at most one folder deep."""
    parts = name.split("/")
    return len(parts) <= 2 and all(Path(p).name == p != ".." for p in parts)


def _facts(folder: Path) -> dict[str, object]:
    place = folder / "plan.json"
    try:
        facts = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PackageError(f"{folder} is not a model's package: it has no plan.json") from None
    except (OSError, ValueError) as error:
        raise PackageError(f"cannot read {place}: {error}") from error
    return facts if isinstance(facts, dict) else {}


def _hash(place: Path) -> str:
    return hashlib.sha256(place.read_bytes()).hexdigest()[:16]
