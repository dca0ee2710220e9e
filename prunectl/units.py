"""Numbers and names as people read and write them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from enum import StrEnum

from prunectl.errors import UsageError

_SI = ("B", "kB", "MB", "GB", "TB", "PB")
_IEC = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_FACTORS = {"": 1, "b": 1}
_FACTORS |= {f"{letter}{end}": 1000**power for power, letter in enumerate("kmgt", 1) for end in ("", "b")}
_FACTORS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([a-z]*)", re.IGNORECASE)
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_TIME = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-zµ]+)", re.IGNORECASE)
_RATIO = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)")


class Units(StrEnum):
    """How bytes are written for people."""

    SI = "si"
    IEC = "iec"
    BYTES = "bytes"


def nbytes(value: int, units: Units = Units.SI) -> str:
    """Format a number of bytes with three digits."""
    if units is Units.BYTES:
        return str(value)
    names, base = (_SI, 1000) if units is Units.SI else (_IEC, 1024)
    power = min(int(math.log(value, base)) if value else 0, len(names) - 1)
    scaled = value / base**power
    if power and round(scaled, 0 if scaled >= 100 else 1 if scaled >= 10 else 2) >= base and power < len(names) - 1:
        power, scaled = power + 1, scaled / base
    digits = 0 if power == 0 or scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {names[power]}"


def count(value: int) -> str:
    """Format a count with commas between thousands."""
    return f"{value:,}"


def percent(value: float) -> str:
    """Format a ratio as a percentage, never rounding to a 0 % or 100 % that is not true."""
    text = f"{value * 100:.1f}"
    if text == "100.0" and value < 1:
        return "> 99.9 %"
    if text == "0.0" and value > 0:
        return "< 0.1 %"
    return f"{text} %"


def duration(seconds: float) -> str:
    """Format a time with three digits, in the unit that puts one to three of them before the decimal point."""
    unit, factor = next(((unit, factor) for unit, factor in _TIMES.items() if seconds >= 0.9995 * factor), ("µs", 1e-6))
    scaled = seconds / factor
    digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{scaled:,.{digits}f} {'µs' if unit == 'us' else unit}"


def parse_duration(text: str) -> float:
    """Parse `5ms`, `1.5 s` or `200us` into seconds; a number without a unit is rejected."""
    match = _TIME.fullmatch(text.strip())
    factor = _TIMES.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{text!r} is not a time", hint="write 5ms, 1.5s or 200us")
    return float(match[1]) * factor


def parse_size(text: str) -> int:
    """Parse `400KB`, `5MiB` or `5242880` into bytes."""
    match = _SIZE.fullmatch(text.strip())
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{text!r} is not a size", hint="write 400KB, 5MiB or 5242880")
    # In integers: in floating point, 1.13 million comes out a little less.
    whole, _, decimals = match[1].partition(".")
    scale: int = 10 ** len(decimals)
    return int(whole + decimals) * factor // scale


def parse_ratio(text: str) -> float:
    """Parse `0.8` or `80%` into a fraction; a bare `80` is rejected, as its percent sign was probably forgotten."""
    match = _RATIO.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a ratio", hint="write 0.8 or 80%")
    value = float(match[1]) / (100 if match[2] else 1)
    if not 0 <= value <= 1:
        hint = (
            f"write {match[1]}% or {float(match[1]) / 100:g}" if not match[2] and value <= 100 else "write 0.8 or 80%"
        )
        raise UsageError(f"{text!r} is not between 0 and 1", hint=hint)
    return value


def listed(names: Sequence[object], most: int, others: str = "") -> str:
    """The first `most` names, then "…", or with `others` how many more there are: "a, b and 3 layers"."""
    rest = len(names) - most
    return ", ".join(map(str, names[:most])) + ("" if rest <= 0 else f" and {rest} {others}" if others else " …")


def printable(text: str) -> str:
    """Escape control characters, which could move a cursor or ring a bell."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode()
