"""Prints what a routed layer can be made of: all parts in short, one of them, or a preset."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.text import Text

from moegen.errors import visible
from moegen.report import vocabulary
from moegen.report.screen import heading, note, plain, table
from moegen.report.vocabulary import SECTION, Part
from moegen.spec import presets
from moegen.spec.dump import inline_yaml
from moegen.spec.element import Element
from moegen.spec.expected import expected
from moegen.spec.shape import slots_of

WIDTH = 100  # of YAML to be copied


def print_parts(screen: Console) -> None:
    """Every part of a routed layer in a token's order with its kinds, then the presets."""
    for part in vocabulary.parts():
        heading(screen, plain(f"{part.name}: {part.purpose}"))
        _print_kinds(screen, part)
    heading(screen, "presets")
    rows = table(None, ("name", ">year", "title"))
    for name in presets.names(SECTION):
        about = presets.about(SECTION, name)
        rows.add_row(plain(name), plain(about.year or ""), plain(about.title))
    screen.print(rows)
    screen.print()
    note(screen, "`moegen routing NAME` tells more of a part, a kind or a preset.")
    note(screen, "`moegen show --routing SPEC` tells what a spec makes of them.")


def print_named(screen: Console, name: str) -> None:
    """The parts, kinds and presets of a name in full."""
    found, named = vocabulary.find(name)
    for part in found:
        _print_part(screen, part)
    for preset in named:
        _print_preset(screen, preset)


def _print_part(screen: Console, part: Part) -> None:
    if len(part.elements) > 1 and part.family:
        heading(screen, plain(f"{part.name}: {part.purpose}"))
        screen.print(plain(part.family.summary()))
        _print_kinds(screen, part)
        element = part.family.members.get(part.family.default_kind or "", part.elements[0])
    else:
        element = part.elements[0]
        kind = vocabulary.kind_of(element)
        heading(screen, plain(f"{part.name}{f', kind {kind}' if kind else ''}: {part.purpose}"))
        screen.print(Text("\n".join(map(visible, vocabulary.about(element).splitlines()))))
        _print_fields(screen, element)
    screen.print()
    screen.print(Text(written(part, element)), soft_wrap=True)
    if part.family and len(part.elements) == 1:
        used = vocabulary.users(part, element)
        if used:
            note(screen, plain(f"In presets: {', '.join(used)}."))


def _print_kinds(screen: Console, part: Part) -> None:
    columns = ("kind", "what it is", "fields") if part.family else ("what it is", "fields")
    rows = table(None, columns)
    rows.columns[0].no_wrap = bool(part.family)  # names are kept whole, sentences are not
    for element in part.elements:
        kind = vocabulary.kind_of(element)
        cells = [plain(element.summary()), plain(", ".join(_shorts(element)))]
        rows.add_row(*([plain(kind)] if part.family else []), *cells)
    screen.print(rows)


def _print_fields(screen: Console, element: type[Element]) -> None:
    fields = vocabulary.fields_of(element)
    if not fields:
        return
    screen.print()
    rows = table(None, ("field", "default", "may be", "what it is"))
    for name, info in fields.items():
        allowed = expected(slots_of(info.annotation, info.metadata))
        told = (name, _default(info), allowed, info.description or "")
        rows.add_row(*map(plain, told))
    screen.print(rows)


def _print_preset(screen: Console, name: str) -> None:
    about = presets.about(SECTION, name)
    year = f" ({about.year})" if about.year else ""
    heading(screen, plain(f"preset {name}: {about.title}{year}"))
    if about.source:
        screen.print(plain(f"Source: {about.source}"))
    screen.print()
    screen.print(Text(presets.text(SECTION, name)), soft_wrap=True, end="")
    screen.print()
    note(screen, plain(f"In a spec: {SECTION}: {{preset: {name}}}; what it says itself wins."))


def written(part: Part, element: type[Element]) -> str:
    """A section of a spec with this element: what is needed, and all else as comments."""
    lines, depth = ["model:", f"  {SECTION}:"], 2
    for key in part.path:
        lines.append(f"{'  ' * depth}{key}:")
        depth += 1
    kind = vocabulary.kind_of(element)
    fields = vocabulary.fields_of(element)
    if part.path[:1] == ("losses",):
        lines.append(f"{'  ' * depth}{kind}:")
        depth += 1
    elif kind:
        lines.append(f"{'  ' * depth}kind: {kind}")
    needed = any(info.is_required() for info in fields.values())
    live = None if needed or kind else element.shorthand
    told = [(_line(name, info, live), info.description or "") for name, info in fields.items()]
    width = max((len(text) for text, _ in told), default=0)
    room = WIDTH - 2 * depth
    for text, description in told:
        whole = f"{text:<{width}}  # {description}"
        if len(whole) > room:
            lines += [f"{'  ' * depth}# {line}" for line in wrap(description, room - 2)]
            whole = text
        lines.append(f"{'  ' * depth}{whole}")
    return "\n".join(lines)


def _line(name: str, info: FieldInfo, live: str | None) -> str:
    """A field as YAML: what is needed, or stands for the section; else as a comment."""
    if info.is_required():
        return f"{name}: {inline_yaml(vocabulary.example(info))}"
    return f"{'' if name == live else '# '}{name}: {_default(info)}"


def _default(info: FieldInfo) -> str:
    return "needed" if info.is_required() else inline_yaml(vocabulary.default_of(info))


def _shorts(element: type[Element]) -> Iterator[str]:
    """The fields in short: `dim: null`, `normalize: both | experts`."""
    for name, info in vocabulary.fields_of(element).items():
        others = [one for one in vocabulary.options_of(info) if one != _raw(info)]
        words = [_default(info), *map(str, others)]
        yield f"{name}: {' | '.join(words)}"


def _raw(info: FieldInfo) -> Any:
    return None if info.is_required() else vocabulary.default_of(info)
