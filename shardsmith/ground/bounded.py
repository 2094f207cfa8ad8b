"""Text files of strangers that are read whole: regular ones, of a bounded size, whatever lies in their place."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from shardsmith.ground.remote_path import RemotePath

_LONGEST_LINE = 1 << 16


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Return what is in a regular file of text. A pipe or a device in its place neither blocks nor is read.

    Raises:
        ValueError: it is no regular file, begins with NUL, or has more than ``most_bytes``, also if it grows meanwhile.
        OSError: it cannot be read, or is not there.
        StorageError: its store cannot be reached.
    """
    if isinstance(path, RemotePath):
        data = path.read_all(most_bytes)
        if data[:1] == b"\0":
            raise ValueError("it begins with NUL, as no text does")
        return data
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most_bytes:
            raise ValueError(f"{stat.filemode(status.st_mode)} {status.st_size} bytes; {most_bytes} at most are read")
        if file.peek(1)[:1] == b"\0":  # a hole costs its writer nothing
            raise ValueError("it begins with NUL, as no text does")
        # One byte more than there was: what comes then shows that it grows.
        data = file.read(status.st_size + 1)
    if len(data) > status.st_size:
        raise ValueError(f"it had {status.st_size} bytes and grows while it is read")
    return data


def lines_of(file: Path) -> Iterator[str]:
    """The lines of a log, without those that are too long to be of ours; nothing if there is none.

    On a disk it is read line by line, from a store as a whole. Raises OSError, StorageError.
    """
    if isinstance(file, RemotePath):
        with contextlib.suppress(FileNotFoundError):
            yield from _lines_in(io.BytesIO(file.read_all()))
    elif file.is_file():
        with file.open("rb") as content:
            yield from _lines_in(content)


def _lines_in(content: BinaryIO) -> Iterator[str]:
    is_rest = False  # of a line that is too long
    while part := content.readline(_LONGEST_LINE):
        is_whole = part.endswith(b"\n") or len(part) < _LONGEST_LINE
        if is_whole and not is_rest:
            yield part.decode(errors="replace")
        is_rest = not is_whole
