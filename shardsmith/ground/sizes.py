"""Sizes in bytes as text."""

from __future__ import annotations

import re
from fractions import Fraction

from shardsmith.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *(|[KMGT]I?)B?", re.IGNORECASE)


def parse_size(size_or_text: str | int) -> int:
    """Bytes in "5GB" (decimal, as on the Hub), "4.5 GiB" (binary), "5000000" or 5_000_000.

    Raises:
        UsageError: when it is neither, or less than one byte.
    """
    text = str(size_or_text)
    match = _SIZE.fullmatch(text.strip())
    # A Fraction, as a float would round sizes such as 4.7GB.
    size = int(Fraction(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise UsageError(f"not a size: {size_or_text!r}; write it like 5GB, 500MB or 4GiB")
    return size


def size_text(nbytes: int) -> str:
    """``1.23 GB``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"
