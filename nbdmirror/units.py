"""Sizes and rates: bytes in, bytes out, base 1024 in between."""

from __future__ import annotations

import re
from typing import Final

from nbdmirror.errors import UsageError

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB
TiB: Final = 1024 * GiB

_SUFFIXES: Final = {"": 1, "k": KiB, "m": MiB, "g": GiB, "t": TiB, "p": 1024 * TiB, "e": 1024 * 1024 * TiB}
# Twenty digits hold every size there is; without a bound int() would refuse very long numbers in its own way.
_SIZE: Final = re.compile(r"(\d{1,20})(?:\.(\d{1,20}))?\s*(?:([kmgtpe])(?:i?b)?|b)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Bytes from `65536`, `64k`, `64KiB` or `1.5G`; raises UsageError for anything else, fractions of a byte included."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"'{text}' is not a size: write bytes, or a number with k, M, G, T or P (base 1024)")
    whole, fraction, suffix = match.groups()
    unit = _SUFFIXES[(suffix or "").lower()]
    if not fraction:
        return int(whole) * unit
    scaled = int(whole + fraction) * unit
    if scaled % 10 ** len(fraction):
        raise UsageError(f"'{text}' is not a whole number of bytes")
    return int(scaled // 10 ** len(fraction))


def format_size(size: float) -> str:
    """A size for people: `1.5 GiB`; exact bytes below 1 KiB."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < KiB:
            return f"{value:.0f} {unit}" if unit == "bytes" or value.is_integer() else f"{value:.1f} {unit}"
        value /= KiB
    return f"{value:.1f} PiB"


def round_down(value: int, unit: int) -> int:
    """The largest multiple of `unit` that is not above `value`."""
    return value - value % unit


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit
