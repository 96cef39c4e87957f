"""Writing packages: whole or not at all, never over a user's edits, nothing outside the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_specs import SPECS

import moegen
from moegen.backend import backend
from moegen.emit import write as writing
from moegen.emit.package import Package, package
from moegen.emit.write import write
from moegen.errors import PackageError


@pytest.fixture(scope="module")
def made() -> Package:
    return package(moegen.plan(SPECS["plain-moe"], sequence=8), backend("eager"))


def test_a_second_build_touches_nothing(made: Package, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert set(write(made, folder, force=False)) == set(made.files)
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert write(made, folder, force=False) == []
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == times


def test_edited_files_are_kept_unless_forced(made: Package, tmp_path: Path) -> None:
    write(made, tmp_path, force=True)
    edited = tmp_path / "model.py"
    edited.write_text(edited.read_text() + "# mine\n")
    with pytest.raises(PackageError, match=r"edited since they were generated: model\.py"):
        write(made, tmp_path, force=False)
    assert edited.read_text().endswith("# mine\n")
    assert write(made, tmp_path, force=True) == ["model.py"]
    assert edited.read_text() == made.files["model.py"]


def test_a_folder_with_other_things_is_refused(made: Package, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PackageError, match="not a model's"):
        write(made, tmp_path, force=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(made: Package, tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.write_text("a file")
    for force in (False, True):
        with pytest.raises(PackageError):
            write(made, place, force=force)
    assert place.read_text() == "a file"


def test_links_are_replaced_and_not_followed(made: Package, tmp_path: Path) -> None:
    outside = tmp_path / "outside.py"
    outside.write_text("precious")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.py").symlink_to(outside)
    write(made, folder, force=True)
    assert outside.read_text() == "precious"
    assert not (folder / "model.py").is_symlink()
    assert (folder / "model.py").read_text() == made.files["model.py"]


def test_files_of_an_older_version_go(made: Package, tmp_path: Path) -> None:
    write(made, tmp_path, force=False)
    fewer = {k: v for k, v in made.files.items() if k != "ops.py"}
    write(Package(made.name, fewer), tmp_path, force=False)
    assert not (tmp_path / "ops.py").exists()


def test_a_disk_that_fails_leaves_no_half_written_file(
    made: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(made, tmp_path, force=False)
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}
    other = package(moegen.plan(SPECS["gpt-oss-like"], sequence=8), backend("eager"))
    real, count = writing.put, 0

    def failing(place: Path, text: str) -> bool:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, "No space left on device")
        return real(place, text)

    monkeypatch.setattr(writing, "put", failing)
    with pytest.raises(PackageError, match="No space left on device"):
        write(other, tmp_path, force=False)
    for place in tmp_path.iterdir():
        assert place.read_text() in (before[place.name], other.files[place.name])
    # plan.json is last, so what it tells is still the old package.
    assert (tmp_path / "plan.json").read_text() == before["plan.json"]
    monkeypatch.setattr(writing, "put", real)
    write(other, tmp_path, force=False)  # and the next try goes through
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict(other.files)


def test_check_tells_what_differs(tmp_path: Path) -> None:
    moegen.build(SPECS["plain-moe"], tmp_path)
    assert moegen.check(tmp_path) == []
    (tmp_path / "ops.py").write_text("import os\n")
    (tmp_path / "runtime.py").unlink()
    assert moegen.check(tmp_path) == [
        "ops.py differs from what the spec gives",
        "runtime.py is missing",
    ]


def test_check_of_something_else_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"has no plan\.json"):
        moegen.check(tmp_path)


def test_a_forged_record_cannot_remove_files_elsewhere(made: Package, tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    folder = tmp_path / "model"
    write(made, folder, force=False)
    (folder / "plan.json").write_text('{"files": {"../victim.txt": "0"}}')
    write(made, folder, force=True)
    assert victim.read_text() == "precious"
