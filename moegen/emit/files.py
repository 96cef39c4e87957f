"""Puts text on the disk, a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def put(place: Path, text: str) -> bool:
    """Put text in a file in one step, so whole or not at all; whether the file changed.

    A link there is replaced, and not followed.
    """
    ordinary = place.is_file() and not place.is_symlink()
    if ordinary and place.read_bytes() == text.encode():
        return False
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(place)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True
