"""Texts from strangers' files, fit for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with everything but printable characters escaped: no colours, no line breaks, no change of direction."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
