"""How many bytes of which files were compared with what is recorded of them: what a verdict may claim, and no more."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from shardsmith.ground import layout
from shardsmith.ground.bounded import read_bounded
from shardsmith.ground.remote_export import is_claim
from shardsmith.ground.remote_path import RemotePath
from shardsmith.manifest.seal import require_seal


class ComparedBytes:
    """Bytes that were read and are as recorded, by file. Thread-safe.

    Only code that has just read and compared bytes adds to it. What is verified is worked out from it, never from what
    should have been read.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._bytes: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, file: Path, nbytes: int) -> None:
        """Count bytes of a file that were read and are as recorded."""
        with self._lock:
            self._bytes[str(file)] = self._bytes.get(str(file), 0) + nbytes

    def of(self, directory: Path, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the bytes that were compared, by name, of the files of a directory; at most the size of each.

        Args:
            directory: Where the files are.
            sizes: Bytes by name.
        """
        counted = {name: self._bytes.get(str(directory / name), 0) for name in sizes}
        return {name: min(nbytes, sizes[name]) for name, nbytes in counted.items()}


def compare_seal(path: Path, compared: ComparedBytes) -> None:
    """Count the bytes of a JSON file of ours that has its own hash; older ones have none.

    Raises:
        CorruptCheckpointError: it has changed since it was written.
    """
    data = read_bounded(path, path.stat().st_size)
    if require_seal(path, data, json.loads(data)):
        compared.add(path, len(data))


def file_sizes(directory: Path) -> dict[str, int]:
    """Return the bytes of every file in a directory and below it, by its path from there.

    A link counts as a file of its own size, whatever it leads to. What goes meanwhile is left out.
    """
    if isinstance(directory, RemotePath):
        of_step = (directory / layout.METADATA_FILE).is_file()
        found: dict[str, int] = directory.sizes() if of_step else directory.objects_below()
        return {name: nbytes for name, nbytes in sorted(found.items()) if not is_claim(name)}
    sizes = {}
    for parent, folders, names in os.walk(directory):
        links = (name for name in folders if os.path.islink(os.path.join(parent, name)))
        for name in (*names, *links):
            with contextlib.suppress(FileNotFoundError):
                path = os.path.join(parent, name)
                sizes[os.path.relpath(path, directory)] = os.lstat(path).st_size
    return dict(sorted(sizes.items()))
