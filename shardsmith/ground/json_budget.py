"""A limit on what JSON from strangers may make: ``[[],[],...`` takes thirty times its size in memory."""

from __future__ import annotations

# Allowed whatever the length of the text, so that no short text is refused.
_FREE = 100_000


def require_json_budget(text: bytes) -> None:
    """Return if a text describes files and tensors; ValueError if it makes more lists and objects than those take.

    A tensor in a header is three of them in 50 bytes or more.
    """
    # Counted before a parser makes anything. Characters within strings count as well, so the limits are generous.
    values = text.count(b",")
    if values > max(10 * _FREE, len(text) // 8):
        raise ValueError(f"it may make {values} values, which is more than what describes tensors")
    count = text.count(b"{") + text.count(b"[")
    if count > max(_FREE, len(text) // 12):
        raise ValueError(f"it may make {count} lists and objects, which is more than what describes tensors")
