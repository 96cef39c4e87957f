"""Turns an unquoted YAML scalar into a value, as YAML 1.2 reads it and without its surprises."""

from __future__ import annotations

import math
import re

LARGEST = 10**15
_LONGEST = 64  # characters of a number

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.inf|\.nan", re.IGNORECASE)
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_NO_BOOLEAN = {
    **dict.fromkeys(("yes", "on", "y"), "true"),
    **dict.fromkeys(("no", "off", "n"), "false"),
}

Scalar = str | int | float | bool | None


class Refused(ValueError):
    """A scalar that no spec needs, with the reason and what to do."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        """Keep the sentence and the advice."""
        super().__init__(message)
        self.message = message
        self.hint = hint


def resolve(text: str) -> Scalar:
    """The value of an unquoted scalar; what only looks like a number or a date stays text."""
    if text in _WORDS:
        return _WORDS[text]
    if _SPECIAL.fullmatch(text):
        raise Refused(f"{text} is not a finite number")
    if _INT.fullmatch(text):
        return _whole(text)
    if _FLOAT.fullmatch(text):
        return _fraction(text)
    return text


def number_hint(text: str, *, whole: bool) -> str | None:
    """What to write instead of a text that looks like a number, where one is expected."""
    bare = text.strip().replace("_", "").replace(",", "").lower()
    if len(bare) > _LONGEST:
        return None
    try:
        value: float = int(bare, 0) if re.match(r"[-+]?0[xob]", bare) else int(bare)
    except ValueError:
        if not _FLOAT.fullmatch(bare):
            return None
        value = float(bare)
        if whole and not (math.isfinite(value) and value.is_integer()):
            return None
        value = int(value) if whole else value
    if abs(value) > LARGEST:
        return None
    quotes = " without quotes" if text == str(value) else ""
    return f"write {value}{quotes}"


def boolean_hint(text: str) -> str | None:
    """What to write instead of a text that other YAML readers take for true or false."""
    word = _NO_BOOLEAN.get(text.lower()) or (text.lower() if text.lower() in _WORDS else None)
    if word not in ("true", "false"):
        return None
    return f"write {word}{' without quotes' if text.lower() == word else ''}"


def _whole(text: str) -> int:
    if len(text) > 19 or abs(int(text)) > LARGEST:
        raise Refused("this number is too large", "whole numbers go up to 10^15")
    return int(text)


def _fraction(text: str) -> float:
    if len(text) > _LONGEST:
        raise Refused(f"a number has at most {_LONGEST} characters")
    value = float(text)
    if math.isinf(value):
        raise Refused("this number is too large")
    mantissa = re.split("[eE]", text)[0]
    if value == 0 and mantissa.strip("+-0."):
        raise Refused("this number is too small", "it would become 0")
    return value
