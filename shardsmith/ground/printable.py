"""Texts and paths, fit for a terminal."""

from __future__ import annotations

from pathlib import Path

from shardsmith.ground.remote_path import RemotePath


def printable(text: str) -> str:
    """The text with everything but printable characters escaped: no colours, no line breaks, no change of direction."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown(path: str | Path) -> str:
    """The path as one would type it: relative where it lies in the current directory."""
    try:
        return str(Path(path).relative_to(Path.cwd())) if not isinstance(path, RemotePath) else str(path)
    except (OSError, ValueError):
        return str(path)
