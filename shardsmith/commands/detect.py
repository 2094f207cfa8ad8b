"""``shardsmith detect``: which format a path has."""

from __future__ import annotations

from pathlib import Path

import tyro


def detect(path: tyro.conf.Positional[Path], json: bool = False) -> int:
    """Print the format of a file or directory.

    Also prints how it was detected. Exits with 1 if the format is unknown.

    Example: shardsmith detect out/checkpoint-500

    Args:
        path: Any file or directory, or a place in an object store such as s3://bucket/run/step-500.
        json: Print JSON on one line.
    """
    from json import dumps

    from shardsmith.formats.by_path import UNKNOWN, detect_checkpoint_format
    from shardsmith.ground.remote_path import as_path

    path = as_path(path)
    found = detect_checkpoint_format(path)
    as_json = {"path": str(path), "format": found.name, "reason": found.reason}
    print(dumps(as_json) if json else f"{found.name}: {found.reason}")
    return 1 if found.name == UNKNOWN else 0
