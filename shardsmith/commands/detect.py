"""``shardsmith detect``: which format a path has."""

from __future__ import annotations

from pathlib import Path

import tyro


def detect(path: tyro.conf.Positional[Path]) -> int:
    """Say which format a file or directory has, and why.

    Example: shardsmith detect out/checkpoint-500

    Args:
        path: Any file or directory.
    """
    from shardsmith.formats.by_path import detect_checkpoint_format

    found = detect_checkpoint_format(path)
    print(f"{found.name}: {found.reason}")
    return 0
