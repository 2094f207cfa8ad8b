"""A step on the disks of the hosts, put into an object store: each file by a rank that sees it, the manifest last."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
)
from shardsmith.ground import layout
from shardsmith.ground.commit import writing
from shardsmith.ground.new_file import new_file
from shardsmith.ground.object_store import PART_BYTES
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_commit import RemoteAttempt, attempt_of_any
from shardsmith.ground.remote_path import RemotePath
from shardsmith.manifest.metadata import read_metadata


def upload_step(step: Path, target: RemotePath, ranks: Ranks) -> bool:
    """Put a committed step into a store, under the id that it has. All ranks; any thread; communicates.

    Each file is compared with its recorded hash while it is read. What a former attempt has put is put again.

    Args:
        step: Where it is on the disk of each host; all of them together must have all of its files.
        target: Where it is to be.
        ranks: Those that upload, in a thread of their own.

    Returns:
        False if the store has it already.

    Raises:
        RankFailedError: on all ranks; with one rank the original error. The step is not in the store.
    """
    phase = f"uploading {target.name}"
    job = _Job(step, target)
    with contextlib.ExitStack() as unfinished:
        own = ranks.deal(phase, lambda: files_of(step), lambda found: job.deal(found, unfinished), large=True)
        if own["attempt"] is None:
            return False
        ranks.gather(phase, lambda: _put(step, target / own["attempt"], own["names"]))
        # From a rank that has it: rank 0 may be on a host without the step.
        says = own["speaker"] == ranks.rank
        texts = ranks.gather(phase, lambda: (step / layout.METADATA_FILE).read_text() if says else "", large=True)
        ranks.lead(phase, lambda: job.commit("".join(texts)))
    return True


class _Job:
    """What rank 0 knows of an upload."""

    def __init__(self, step: Path, target: RemotePath) -> None:
        self._step = step
        self._target = target
        self._attempt: RemoteAttempt | None = None
        self._sizes: dict[str, int] = {}

    def deal(self, found: Sequence[dict[str, Any]], unfinished: contextlib.ExitStack) -> list[dict[str, Any]]:
        """For each rank what it is to put; begins the attempt, which ends with ``unfinished``."""
        speaker = next((rank for rank, one in enumerate(found) if one["attempt"]), None)
        if speaker is None:
            raise CheckpointNotFoundError(self._step, "is on no host any more, and cannot be uploaded")
        attempt = found[speaker]["attempt"]
        if attempt_of_any(self._target) == attempt:
            return [{"attempt": None}] * len(found)
        # Files of another attempt are not of this step.
        seen = [one["files"] if one["attempt"] == attempt else {} for one in found]
        self._sizes = {name: size for files in seen for name, size in files.items()}
        if len(self._sizes) < found[speaker]["wanted"]:
            have = f"{len(self._sizes)} of {found[speaker]['wanted']}"
            raise IncompleteCheckpointError(self._step, f"the hosts of this job have {have} of its files; not uploaded")
        with writing(self._target, "beginning"):
            self._attempt = unfinished.enter_context(RemoteAttempt(self._target, attempt))
        return [{"attempt": attempt, "speaker": speaker, "names": names} for names in _dealt(seen)]

    def commit(self, manifest: str) -> None:
        """Put the manifest, with which the step is in the store."""
        assert self._attempt is not None
        with writing(self._target, "committing"):
            self._attempt.write(layout.METADATA_FILE, manifest.encode())
            self._attempt.commit(self._sizes)


def files_of(step: Path) -> dict[str, Any]:
    """Return what this rank's disk has of a step: its attempt, "" without a manifest, and its files by name and size.

    Files that are not of the size that the manifest says count as missing.
    """
    try:
        manifest = read_metadata(step)
    except CheckpointError:
        return {"attempt": "", "files": {}, "wanted": 0}
    sizes = {name: _size(step / name) for name in manifest.files}
    here = {name: size for name, size in sizes.items() if size == manifest.files[name].size}
    return {"attempt": manifest.attempt, "files": here, "wanted": len(manifest.files)}


def _size(file: Path) -> int | None:
    try:
        return file.lstat().st_size
    except OSError:
        return None


def _dealt(found: Sequence[Mapping[str, int]]) -> list[list[str]]:
    """For each rank the files that it puts: of those that it sees, so that all have about as many bytes."""
    seen: dict[str, list[int]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for rank, files in enumerate(found):
        for name, size in files.items():
            seen[name].append(rank)
            sizes[name] = size
    load, shares = [0] * len(found), list[list[str]]([] for _ in found)
    # The largest first, each to the rank that has least so far.
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(seen[name], key=lambda rank: (load[rank], rank))
        load[rank] += sizes[name]
        shares[rank].append(name)
    return shares


def _put(step: Path, directory: RemotePath, names: Sequence[str]) -> None:
    expected = read_metadata(step).files if names else {}
    for name in names:
        digest = xxhash.xxh3_128()
        with writing(directory / name, "upload"):
            upload = new_file(directory / name, expected[name].size)
            with contextlib.closing(upload):
                for block in _blocks(step / name):
                    digest.update(block)
                    upload.write(block)
                # Before `finish`, so that what has changed becomes no object.
                if digest.hexdigest() != expected[name].xxh3_128:
                    raise CorruptCheckpointError(step, f"{name} has changed since it was written; it is not uploaded")
                upload.finish()


def _blocks(file: Path) -> Iterator[memoryview]:
    # Used again for each block: `write` of an upload copies what it has not sent.
    buffer = memoryview(bytearray(PART_BYTES))
    with file.open("rb", buffering=0) as content:
        while count := content.readinto(buffer):
            yield buffer[:count]
