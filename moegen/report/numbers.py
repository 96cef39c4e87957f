"""Numbers as people read them: exact with separators, and short with a decimal unit."""

from __future__ import annotations

from fractions import Fraction

Number = int | float | Fraction

_COUNT = ("", " K", " M", " B", " T", " Q")
_BYTES = (" B", " kB", " MB", " GB", " TB", " PB")
_FLOPS = ("", " K", " M", " G", " T", " P", " E")

BYTES_NOTE = "1 GB = 10^9 bytes"


def exact(value: Number) -> str:
    """671026404352 as 671,026,404,352; what is no whole number gets one decimal."""
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}"
    return f"{float(value):,.1f}"


def count(value: Number) -> str:
    """671026404352 as 671.0 B."""
    return _short(value, _COUNT)


def parameters(value: int) -> str:
    """671,026,404,352 parameters (671.0 B); a small number stands alone."""
    return f"{exact(value)} parameters{'' if value < 1000 else f' ({count(value)})'}"


def work(value: Number) -> str:
    """142.8 GFLOPs."""
    number, _, unit = flops(value).partition(" ")
    return f"{number} {unit}FLOPs"


def size(value: Number) -> str:
    """Bytes in decimal units: 1 GB = 10^9 bytes."""
    return _short(value, _BYTES)


def flops(value: Number) -> str:
    """FLOPs: 81.23 G."""
    return _short(value, _FLOPS)


def seconds(value: float) -> str:
    """A time in s, ms or us: three digits, or whole seconds."""
    if value >= 1:
        return f"{value:.3g} s" if value < 100 else f"{value:,.0f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def share(part: Number, whole: Number) -> str:
    """A part of a whole in per cent."""
    return f"{100 * float(Fraction(part) / Fraction(whole)):.1f} %" if whole else "-"


def _short(value: Number, units: tuple[str, ...]) -> str:
    """Four significant digits and a unit; below 1000, whole numbers as they are."""
    if -1000 < value < 1000:
        return f"{exact(value)}{units[0]}"
    scaled, power = Fraction(value), 0
    # 999.95 would print as 1000.0
    while abs(scaled) >= Fraction(99995, 100) and power < len(units) - 1:
        scaled, power = scaled / 1000, power + 1
    tens = Fraction(99995, 1000)  # what rounds to 100.0
    digits = 3 if abs(scaled) < tens / 10 else 2 if abs(scaled) < tens else 1
    return f"{float(scaled):.{digits}f}{units[power]}"
