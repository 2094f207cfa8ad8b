"""Directories of object stores for what reads only files of this machine, such as ``from_pretrained``."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shardsmith.ground.commit import require_space, writing
from shardsmith.ground.object_store import PART_BYTES
from shardsmith.ground.open_file import open_file
from shardsmith.ground.remote_path import RemotePath

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.distcp", "*.gguf", "*.h5", "*.msgpack", "*.onnx*")


@contextlib.contextmanager
def on_this_machine(directory: Path, *, weights: bool = False) -> Iterator[Path]:
    """Yield a directory of this machine with the same files: itself, or a copy that is deleted afterwards.

    Args:
        directory: A directory, here or in an object store.
        weights: Whether a copy has files of weights, too.

    Raises:
        WriteError, StorageError: the copy cannot be made.
    """
    if not isinstance(directory, RemotePath):
        yield directory
        return
    found = {n: size for n, size in directory.objects_below().items() if weights or not is_weights(n)}
    with tempfile.TemporaryDirectory(prefix="shardsmith-copy-", ignore_cleanup_errors=True) as folder:
        place = Path(folder, directory.name)
        place.mkdir()
        require_space(place, sum(found.values()))
        for name in found:
            copy_file(directory / name, place / name)
        yield place


def is_weights(name: str) -> bool:
    """Return whether a file is one of weights, by its name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _WEIGHTS)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file of this machine or of a store to this machine. Raises WriteError, StorageError."""
    with writing(target, f"copying {source}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(source, RemotePath):
            shutil.copyfile(source, target)
            return
        buffer, at = memoryview(bytearray(PART_BYTES)), 0
        with contextlib.closing(open_file(source)) as file, target.open("xb") as copy:
            # All of it is read, front to back: so parts are fetched ahead.
            file.expect([(0, file.size)])
            while count := file.read_at(buffer, at):
                copy.write(buffer[:count])
                at += count


def first_bytes(file: Path, count: int) -> bytes:
    """Return how a file of this machine or of a store begins. Raises OSError, StorageError."""
    memory = memoryview(bytearray(count))
    with contextlib.closing(open_file(file, follow_links=True)) as opened:
        return bytes(memory[: opened.read_at(memory, 0)])


def names_below(directory: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield as ``os.walk`` what is in a directory, here or in a store. Folders may be taken out of the list."""
    if not isinstance(directory, RemotePath):
        yield from ((Path(folder), folders, names) for folder, folders, names in os.walk(directory))
        return
    found = [name.split("/") for name in directory.objects_below()]
    yield from _walk(directory, found)


def _walk(directory: Path, found: list[list[str]]) -> Iterator[tuple[Path, list[str], list[str]]]:
    folders = sorted({parts[0] for parts in found if len(parts) > 1})
    yield directory, folders, [parts[0] for parts in found if len(parts) == 1]
    # `folders` is what the caller has left of it, as with `os.walk`.
    for folder in folders:
        yield from _walk(directory / folder, [parts[1:] for parts in found if len(parts) > 1 and parts[0] == folder])
