"""Pictures of a model and of its components, as text for Mermaid or Graphviz."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Shape = Literal["box", "round", "parameter", "call"]


@dataclass(frozen=True)
class Box:
    """One box: lines of text, and what it stands for."""

    id: str
    lines: tuple[str, ...]
    shape: Shape = "box"


@dataclass(frozen=True)
class Arrow:
    """From one box to another; dashed for "is made of"."""

    start: str
    end: str
    label: str = ""
    dashed: bool = False


@dataclass
class Picture:
    """Boxes and arrows, some boxes in a frame of their own with a title."""

    title: str
    boxes: list[Box] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    frames: list[Picture] = field(default_factory=list)


def mermaid(picture: Picture) -> str:
    """A flowchart that GitHub renders inside a ```mermaid block."""
    lines = ["flowchart TD", f"  %% {_one_line(picture.title)}"]
    lines += _mermaid_inside(picture, 1)
    return "\n".join(lines) + "\n"


def _mermaid_inside(picture: Picture, depth: int) -> list[str]:
    pad = "  " * depth
    lines = []
    for number, frame in enumerate(picture.frames):
        name = frame.boxes[0].id if frame.boxes else f"d{depth}_{number}"
        lines.append(f'{pad}subgraph frame_{name}["{_mermaid_text(frame.title)}"]')
        lines += _mermaid_inside(frame, depth + 1)
        lines.append(f"{pad}end")
    for box in picture.boxes:
        start, end = _MERMAID[box.shape]
        text = "<br/>".join(map(_mermaid_text, box.lines))
        lines.append(f'{pad}{box.id}{start}"{text}"{end}')
    for arrow in picture.arrows:
        line = "-.->" if arrow.dashed else "-->"
        label = f'|"{_mermaid_text(arrow.label)}"|' if arrow.label else ""
        lines.append(f"{pad}{arrow.start} {line}{label} {arrow.end}")
    return lines


_MERMAID: dict[Shape, tuple[str, str]] = {
    "box": ("[", "]"),
    "round": ("([", "])"),
    "parameter": ("[/", "/]"),
    "call": ("[[", "]]"),
}


def _mermaid_text(text: str) -> str:
    """Text inside quotes: what Mermaid or HTML would act on becomes an entity code."""
    return "".join(_ENTITIES.get(c, c) for c in _one_line(text))


# A leading backtick would start Markdown; '#' starts an entity code itself.
_ENTITIES = {c: f"#{ord(c)};" for c in '#"<>&`|'}


def dot(picture: Picture) -> str:
    """A digraph for Graphviz: `dot -Tsvg`."""
    lines = [
        f"digraph {_dot_text(picture.title)} {{",
        '  node [shape=box, fontname="Helvetica", fontsize=10]',
        '  edge [fontname="Helvetica", fontsize=9]',
        *_dot_inside(picture, 1),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _dot_inside(picture: Picture, depth: int) -> list[str]:
    pad = "  " * depth
    lines = []
    for number, frame in enumerate(picture.frames):
        name = frame.boxes[0].id if frame.boxes else f"d{depth}_{number}"
        lines += [f"{pad}subgraph cluster_{name} {{", f"{pad}  label={_dot_text(frame.title)}"]
        lines += [*_dot_inside(frame, depth + 1), f"{pad}}}"]
    for box in picture.boxes:
        label = _dot_text(*box.lines)
        lines.append(f"{pad}{box.id} [label={label}{_DOT[box.shape]}]")
    for arrow in picture.arrows:
        facts = [f"label={_dot_text(arrow.label)}"] if arrow.label else []
        facts += ["style=dashed"] if arrow.dashed else []
        style = f" [{', '.join(facts)}]" if facts else ""
        lines.append(f"{pad}{arrow.start} -> {arrow.end}{style}")
    return lines


_DOT: dict[Shape, str] = {
    "box": "",
    "round": ", style=rounded",
    "parameter": ", shape=parallelogram",
    "call": ", peripheries=2",
}


def _dot_text(*lines: str) -> str:
    """Lines as one quoted string; backslashes are Graphviz's escapes, so they are doubled."""
    escaped = (_one_line(line).replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    text = "\\n".join(escaped)
    return f'"{text}"'


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


Writer = Callable[[Picture], str]
FORMATS: dict[str, Writer] = {"mermaid": mermaid, "dot": dot}
