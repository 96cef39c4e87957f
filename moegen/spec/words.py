"""Turns values and misspelt words of a spec into phrases for a message."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any

_SHOWN = 60
_LONGEST_WORD = 64  # difflib is quadratic


def show(value: Any) -> str:
    """A value as a message names it: quoted, in one line, and short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    if isinstance(value, str) and len(value) > _SHOWN:
        return f"{value[: _SHOWN - 3]!r}..."
    return repr(value)


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that a misspelt one most likely means."""
    if len(word) > _LONGEST_WORD:
        return None
    best, score = None, cutoff
    for candidate in sorted(known):
        found = _alike(word.lower(), candidate.lower())
        if found > score or (found == score and best is None):
            best, score = candidate, found
    return best


def _alike(word: str, candidate: str) -> float:
    if word.replace("-", "_") == candidate.replace("-", "_"):
        return 1.0
    matcher = SequenceMatcher(None, word, candidate[:_LONGEST_WORD], autojunk=False)
    # Upper bounds that cost less come first.
    if matcher.real_quick_ratio() < 0.6 or matcher.quick_ratio() < 0.6:
        return 0.0
    return matcher.ratio()


def listed(words: Iterable[str], join: str = "or") -> str:
    """Some words as a phrase: a, b or c; of many only the first."""
    parts = list(words)
    if len(parts) > 12:
        return f"{', '.join(parts[:12])}, ... ({len(parts)} in all)"
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} {join} {parts[-1]}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and a noun: 1 expert, 1,024 experts."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def article(noun: str) -> str:
    """A noun with 'a' or 'an' before it."""
    return f"{'an' if noun[:1] in 'aeiou' else 'a'} {noun}"
