"""What went wrong inside an element's computation, and where."""

from __future__ import annotations

from types import TracebackType

from moegen.graph.names import is_machinery
from moegen.spec.element import Path


class Fault(Exception):
    """An error of torch inside a program, with its place in the spec and in the source."""

    def __init__(self, sentence: str, path: Path, traced_at: str) -> None:
        """Keep all three; the planner turns them into a message with a line."""
        super().__init__(sentence)
        self.path = path
        self.traced_at = traced_at


def raised_at(traceback: TracebackType | None) -> str:
    """The author's line that an exception came through last, as `file:line`."""
    place = ""
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if not is_machinery(name):
            place = f"{short(name)}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


def short(filename: str) -> str:
    """A file of ours from `moegen/` on, any other as it is."""
    _, found, below = filename.replace("\\", "/").rpartition("/moegen/")
    return f"moegen/{below}" if found else filename
