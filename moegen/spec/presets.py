"""Presets: shipped sections of specs, such as the routing of a published model, by name.

A preset of the section `moe` called `switch-base` is the file `moegen/presets/moe/switch-base.yaml`
with two keys: `about`, which says what it is and where it is from, and the section itself.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files
from importlib.resources.abc import Traversable

from pydantic import Field

from moegen.errors import Mark, Problem, SpecError
from moegen.spec.element import Element, Path
from moegen.spec.extends import root_mapping
from moegen.spec.tree import Tree, parse
from moegen.spec.words import nearest, show

ABOUT = "about"
ROOT: Traversable = files("moegen") / "presets"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_SECTION = re.compile(r"[a-z][a-z0-9_]{0,63}")


class About(Element):
    """What a preset is, and where it is from."""

    title: str = Field(description="the method or model, in a few words")
    year: int | None = Field(None, description="when it was published")
    source: str | None = Field(None, description="paper, report or repository it is from")
    notes: str | None = Field(None, description="what a reader should know")


def sections() -> list[str]:
    """The sections of a spec that have presets."""
    folders = ROOT.iterdir() if ROOT.is_dir() else ()
    return sorted(f.name for f in folders if _SECTION.fullmatch(f.name) and names(f.name))


def names(section: str) -> list[str]:
    """The presets of a section; none for a section that has no presets."""
    folder = ROOT / section if _SECTION.fullmatch(section) else None
    if folder is None or not folder.is_dir():
        return []
    stems = (f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
    return sorted(stem for stem in stems if _NAME.fullmatch(stem))


def about(section: str, name: str) -> About:
    """What a preset says of itself."""
    return About.model_validate(_file(section, name, None, ()).data.get(ABOUT))


def text(section: str, name: str) -> str:
    """A preset's file as it is, with its comments."""
    _file(section, name, None, ())
    return (ROOT / section / f"{name}.yaml").read_text(encoding="utf-8")


def read(section: str, name: str, asked: Mark | None = None, path: Path = ()) -> Tree:
    """What a preset puts into its section; an unknown name is an error at the place that asks."""
    tree = _file(section, name, asked, path)
    wrong = [key for key in tree.data if key not in (ABOUT, section)]
    if wrong or not isinstance(tree.data.get(section), dict):
        at: Path = (*wrong, section)[:1]
        message = f"a preset has the keys {ABOUT!r} and {section!r}, which is a section"
        raise SpecError(Problem(message, tree.marks.get(at), at))
    marks = {at[1:]: mark for at, mark in tree.marks.items() if at[:1] == (section,)}
    return Tree(tree.data[section], marks)


def _file(section: str, name: str, asked: Mark | None, path: Path) -> Tree:
    known = names(section)
    if name not in known:
        best = nearest(name, known)
        hint = f"did you mean {best!r}?" if best else None
        note = f"presets of {section}: {', '.join(known)}" if known else None
        message = f"no preset of {section} is called {show(name)}"
        raise SpecError(Problem(message, asked, path, hint, note))
    # The name is one of a listing by now, so no text of a user's makes up a path.
    text = (ROOT / section / f"{name}.yaml").read_text(encoding="utf-8")
    tree = parse(text, f"preset {section}/{name}")
    root_mapping(tree)
    marks = {at: replace(mark, via=asked) for at, mark in tree.marks.items()}
    return Tree(tree.data, marks)
