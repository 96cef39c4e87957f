"""Turns the errors of pydantic into problems that speak of the spec: where, what, what instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from moegen.errors import Mark, Problem, dotted
from moegen.spec import presets
from moegen.spec.element import Broken, Element, OneOf, Path
from moegen.spec.expand import KEY as PRESET
from moegen.spec.expected import advice, expected
from moegen.spec.shape import Place, find, places_of
from moegen.spec.source import Source, locate
from moegen.spec.words import listed, nearest, show

# A hostile spec can hold thousands of wrong keys, and a search for the nearest word takes time.
THOROUGH = 100

_ABOUT_VALUE = re.compile(
    r".*(_type|_parsing|_from_float|_than|_than_equal|_too_short|_too_long|_mismatch)"
    r"|literal_error|enum|multiple_of|finite_number|too_short|too_long|none_required"
)


@dataclass(frozen=True)
class _Case:
    """One error of pydantic and the place that it is about."""

    place: Place
    error: Mapping[str, Any]
    mark: Mark | None

    @property
    def is_about_value(self) -> bool:
        return _ABOUT_VALUE.fullmatch(self.error["type"]) is not None


def explain(root: type[Element], source: Source, error: ValidationError) -> list[Problem]:
    """Each thing that is wrong, once, with its place."""
    cases = []
    for one in error.errors(include_url=False):
        place = find(root, source.data, one["loc"])
        cases.append(_Case(place, one, locate(source.marks, place.path)))
    cases.sort(key=lambda case: (case.mark.file, case.mark.line) if case.mark else ("", 0))
    cases = _distinct(cases)
    explainer = _Explainer(root, source)
    # Unknown keys first: what one of them is likely to mean is then not missing as well.
    thorough = sorted(cases[:THOROUGH], key=lambda case: case.error["type"] != "extra_forbidden")
    problems = [problem for case in thorough for problem in explainer.problems(case)]
    return problems + [
        Problem(f"{label(case.place.path)}: {case.error['msg']}", case.mark, case.place.path)
        for case in cases[THOROUGH:]
    ]


def label(path: Path) -> str:
    """A path in short, as the subject of a sentence: experts.count."""
    words: list[str] = []
    for part in path:
        if isinstance(part, int) and words:
            words[-1] += f"[{part}]"
        else:
            words.append(dotted((part,)))
    count = 2 if len(words) < 3 or words[-2][0].isalpha() else 3  # over.3.count, not 3.count
    return ".".join(words[-count:]) or "the spec"


def _distinct(cases: list[_Case]) -> list[_Case]:
    """Without the branches of a union that say the same, or that the value was not meant for."""
    around = {case.place.path[:length] for case in cases for length in range(len(case.place.path))}
    kept: list[_Case] = []
    told: set[Path] = set()
    for case in cases:
        path = case.place.path
        if case.is_about_value:
            if path in told or (path in around and isinstance(case.place.value, (dict, list))):
                continue
            told.add(path)
        kept.append(case)
    return kept


class _Explainer:
    def __init__(self, root: type[Element], source: Source) -> None:
        self.root = root
        self.source = source
        self.suggested: set[Path] = set()

    def problems(self, case: _Case) -> list[Problem]:
        kind, context = case.error["type"], case.error.get("ctx", {})
        if kind == "extra_forbidden":
            return [self.unknown_key(case)]
        if kind == "missing":
            return self.missing(case)
        if kind == "unknown_kind":
            return [self.unknown_kind(case, context)]
        reason = context.get("error")
        if isinstance(reason, Broken):
            return [self.broken(case, below, sentence) for below, sentence in reason.problems]
        return [self.wrong(case, reason)]

    def unknown_key(self, case: _Case) -> Problem:
        *above, key = case.place.path
        section = find(self.root, self.source.data, tuple(above))
        message, hint = self.meant(section, str(key))
        return Problem(message, case.mark, case.place.path, hint)

    def meant(self, section: Place, key: str) -> tuple[str, str | None]:
        """The message for an unknown key, and what it is likely to mean."""
        message = f"unknown key {show(key)}"
        known = {name for element in section.elements() for name in element.model_fields}
        if any(presets.names(str(part)) for part in section.path[-1:]):
            known.add(PRESET)
        before, colon, _ = key.partition(":")
        if colon and before in known:
            self.suggested.add((*section.path, before))
            return message, f"write a space after '{before}:'"
        if best := nearest(key, known, cutoff=0.8):
            self.suggested.add((*section.path, best))
            return message, f"did you mean {best!r}?"
        if kinds := _kinds_with(section, key):
            return f"{message} here", f"it belongs to kind {listed(map(repr, kinds))}"
        if places := places_of(self.root, self.source.data, key):
            place = max(places, key=lambda path: (_shared(path, section.path), -len(path)))
            where = dotted(place) if place else "the top level"
            return f"{message} here", f"it belongs in {where}"
        if best := nearest(key, known):
            self.suggested.add((*section.path, best))
            return message, f"did you mean {best!r}?"
        return message, f"the keys here are {listed(sorted(known), 'and')}" if known else None

    def missing(self, case: _Case) -> list[Problem]:
        *above, key = case.place.path
        section = find(self.root, self.source.data, tuple(above))
        if case.place.path in self.suggested:
            return []
        infos = [e.model_fields[str(key)] for e in section.elements() if key in e.model_fields]
        told = next((info.description for info in infos if info.description), None)
        told = told or expected(case.place.slots)
        message = f"{label(section.path)} needs {show(key)}" + (f": {told}" if told else "")
        return [Problem(message, case.mark, section.path)]

    def unknown_kind(self, case: _Case, context: Mapping[str, Any]) -> Problem:
        known, kind = context["known"], context["kind"]
        path = case.place.path
        if isinstance(case.place.value, dict):
            path = (*path, "kind")
        best = nearest(kind, known)
        hint = f"did you mean {best!r}?" if best else f"known: {listed(known, 'and')}"
        message = f"no {context['family']} is called {show(kind)}"
        return Problem(message, locate(self.source.marks, path), path, hint)

    def broken(self, case: _Case, below: Path, sentence: str) -> Problem:
        path = (*case.place.path, *below)
        return Problem(sentence, locate(self.source.marks, path), path)

    def wrong(self, case: _Case, reason: Any) -> Problem:
        path, slots, value = case.place.path, case.place.slots, case.error["input"]
        if case.error["loc"][-1:] == ("[key]",):
            wanted = expected(find(self.root, self.source.data, path[:-1]).keys())
            message = f"a key of {label(path[:-1])} must be {wanted}, not {show(path[-1])}"
            return Problem(message, case.mark, path)
        wanted = expected(slots)
        if wanted and (case.is_about_value or case.error["type"] in ("missing_part", "bad_part")):
            message = f"{label(path)} must be {wanted}, not {show(value)}"
            return Problem(message, case.mark, path, advice(value, slots))
        sentence = str(reason) if reason else case.error["msg"]
        return Problem(f"{label(path)}: {sentence}", case.mark, path)


def _kinds_with(section: Place, key: str) -> list[str]:
    """The other kinds of the section's family that have a key."""
    families = [slot.type.family for slot in section.slots if isinstance(slot.type, OneOf)]
    return sorted(
        name
        for family in families
        for name, member in family.members.items()
        if key in member.model_fields
    )


def _shared(path: Path, other: Path) -> int:
    """How many keys two paths have in common from the root."""
    same = [a == b for a, b in zip(path, other, strict=False)]
    return (*same, False).index(False)
