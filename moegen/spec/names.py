"""Turns the name of a spec into a directory name and a Python identifier that are safe."""

from __future__ import annotations

import keyword
import re
import unicodedata

_NAME = re.compile(r"[a-z][a-z0-9._-]{0,63}", re.IGNORECASE | re.ASCII)
# Windows opens a device for these, whatever the extension.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10))}


def safe_name(text: str) -> str | None:
    """What is wrong with a name that is to become a package, or None."""
    if "/" in text or "\\" in text:
        return "a name has no path separators"
    if ".." in text or text.endswith("."):
        return "a name has no '..' and does not end with '.'"
    if len(text) > 64:
        return "a name has at most 64 characters"
    if not _NAME.fullmatch(text):
        return "a name starts with a letter; then come letters a-z, digits, '.', '_' and '-'"
    if text.split(".")[0].lower() in _DEVICES:
        return "this name is a device on Windows"
    return None


def identifier(name: str) -> str:
    """A name as a Python identifier: deepseek-v3 becomes deepseek_v3."""
    # Python reads identifiers in NFKC, so that a fullwidth 'class' is the keyword.
    plain = unicodedata.normalize("NFKC", name)
    word = re.sub(r"[^A-Za-z0-9_]+", "_", plain).strip("_") or "model"
    if word[0].isdigit():
        word = f"model_{word}"
    return f"{word}_" if keyword.iskeyword(word) else word
