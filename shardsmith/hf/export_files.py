"""What an exported directory records of its own files in ``shardsmith.json``, and what has changed since.

A file of weights is recorded by its size and the hash of its header: the rest of its bytes are tensors, whose digests
are recorded already, so no rank has to read what all have written. Every other file has the hash of its bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from shardsmith.errors import CheckpointError, CorruptCheckpointError
from shardsmith.formats.safetensors_files.source import SafetensorsSource
from shardsmith.ground import layout
from shardsmith.ground.open_file import OpenFile, open_file
from shardsmith.ground.printable import printable
from shardsmith.ground.remote_export import is_claim
from shardsmith.ground.remote_path import RemotePath
from shardsmith.manifest.checkpoints import file_damage, hash_file, step_in_name
from shardsmith.manifest.compared import ComparedBytes, compare_seal
from shardsmith.manifest.fields import count, digest_text, typed
from shardsmith.manifest.metadata import (
    FileRecord,
    file_record,
    has_manifest,
    read_json,
    read_metadata,
)
from shardsmith.sharding.source_digests import digest_source
from shardsmith.tensors.digest import Digest

_HEADER = "header_xxh3_128"


def file_records(directory: Path, sizes: Mapping[str, int], weights: Collection[str]) -> dict[str, Any]:
    """Return what to record of each file, by its path in the directory. Reads all but the weights. Raises OSError."""
    return {
        name: {"size": size, _HEADER: _hash_header(directory / name)[0]}
        if name in weights
        else {"size": size, "xxh3_128": hash_file(directory / name)}
        for name, size in sorted(sizes.items())
    }


def find_export_damage(directory: Path, *, contents: bool = True, compared: ComparedBytes | None = None) -> list[str]:
    """Return what has changed in an exported directory since it was written, one line each; empty if nothing has.

    Empty, too, for a directory that is not ours, or older than this record.

    Args:
        directory: An exported directory.
        contents: Also read every byte; otherwise only names and sizes.
        compared: Where to count the bytes that were compared.
    """
    compared = compared or ComparedBytes()
    try:
        # Sealed: the record has a hash of itself, so that a change of it is found as well.
        record = read_json(directory / layout.PROVENANCE_FILE, sealed=True) if _is_ours(directory) else {}
        if "files" not in record:
            return []
        if contents:
            compare_seal(directory / layout.PROVENANCE_FILE, compared)
        return [printable(line) for line in _damage(directory, record, compared, contents=contents)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"{layout.PROVENANCE_FILE}: is damaged: {type(error).__name__}: {error}"]
    except CheckpointError as error:
        return [str(error)]


def records_files(directory: Path) -> bool:
    """Return whether a directory says what its files were when it was written."""
    try:
        return _is_ours(directory) and "files" in read_json(directory / layout.PROVENANCE_FILE)
    except CheckpointError:
        return False


def _is_ours(directory: Path) -> bool:
    mark = directory / layout.PROVENANCE_FILE
    return mark.is_file() if isinstance(mark, RemotePath) else os.path.lexists(mark)


def _damage(directory: Path, record: Mapping[str, Any], compared: ComparedBytes, *, contents: bool) -> Iterator[str]:
    step = record["step"]
    if step is not None and step_in_name(directory, step) != count(step):
        # A copy under the name of another step would be resumed from, or pushed, as that step.
        yield f"{layout.PROVENANCE_FILE} is of step {step}: the directory was copied or renamed"
    files = typed(record["files"], dict)
    for name in sorted(_names_in(directory) - {*files, *_of_checkpoint(directory), layout.PROVENANCE_FILE}):
        yield f"{name!r}: is not one of its files"
    # Tensors are read only if sizes and headers are right; else their places in the files are unknown.
    sound = True
    for name, expected in sorted(files.items()):
        if problem := _file_problem(directory, name, expected, compared, contents=contents):
            sound = False
            yield f"{name}: {problem}"
    if contents and sound:
        for model in typed(record["models"], dict).values():
            yield from _changed_tensors(directory, model, compared)


def _of_checkpoint(directory: Path) -> set[str]:
    """The files of a checkpoint of ours that the directory is, too: its own metadata.json answers for them."""
    if not has_manifest(directory):
        return set()
    return {layout.METADATA_FILE, *read_metadata(directory).files}


def _names_in(directory: Path) -> set[str]:
    if isinstance(directory, RemotePath):
        return {name for name in directory.objects_below() if not is_claim(name)}
    # A link to a folder is not followed and counts as a file: it is none of ours.
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir() or path.is_symlink()}


def _file_problem(directory: Path, name: str, expected: Any, compared: ComparedBytes, *, contents: bool) -> str | None:
    path = directory / name
    # The record is data that somebody may have changed: it must not lead out of the directory.
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} is not the name of a file in the directory")
    if _HEADER not in expected:
        return file_damage(path, file_record(expected), contents=contents, compared=compared)
    # A hash of weights would be of bytes that their digests cover already.
    problem = file_damage(path, FileRecord(size=count(expected["size"]), xxh3_128=""), contents=False)
    if problem is None and contents:
        found, read = _hash_header(path)
        if found != digest_text(expected[_HEADER]):
            return "its header has changed since it was written"
        compared.add(path, read)
    return problem


def _hash_header(path: Path) -> tuple[str, int]:
    """Of the bytes of a safetensors file before its tensors, and how many those are."""
    with contextlib.closing(open_file(path)) as file:
        length = _first_bytes(file, 8)
        # The first 8 bytes are the header's length; capped, so that a damaged one does not ask for all memory.
        header = _first_bytes(file, 8 + min(int.from_bytes(length, "little"), 100 << 20))
        return xxhash.xxh3_128_hexdigest(header), len(header)


def _first_bytes(file: OpenFile, count: int) -> bytearray:
    """The beginning of a file, or all of one that is shorter."""
    data, done = bytearray(min(count, file.size)), 0
    while read := file.read_at(memoryview(data)[done:], done):
        done += read
    return data[:done]


def _changed_tensors(directory: Path, model: Mapping[str, Any], compared: ComparedBytes) -> Iterator[str]:
    names = {str(name): directory / name for name in typed(model["files"], list)}
    source = SafetensorsSource(directory, names)
    try:
        recorded = typed(model["tensors"], dict)
        if set(recorded) != set(source.specs):
            raise CorruptCheckpointError(directory, "does not hold the tensors that it records")
        dtypes: dict[str, torch.dtype] = {name: spec.dtype for name, spec in source.specs.items()}
        read: dict[str, int] = {}
        for name, found in digest_source(source, dtypes, read=read).items():
            if found != Digest.parse(recorded[name]["digest"]):
                yield f"{source.file_of[name]}: {name}: has other values than were written"
            else:
                compared.add(names[source.file_of[name]], read.get(name, 0))
    finally:
        source.close()
