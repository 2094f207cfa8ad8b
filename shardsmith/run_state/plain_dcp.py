"""The way back from one write: a checkpoint whose weights are Hugging Face files, all of it as a plain DCP directory.

The keys, shapes and values are those that the run would have saved without ``weights="huggingface"``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shardsmith.errors import CorruptCheckpointError, UsageError
from shardsmith.formats.dcp.beside_weights import open_step, recorded_names
from shardsmith.formats.dcp.rank_file import write_rank_file
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.ground import layout
from shardsmith.ground.bounded import read_bounded
from shardsmith.ground.commit import AnyAttempt, Attempt, begin_attempt, refuse_existing, require_space
from shardsmith.ground.mapped import MappedFile
from shardsmith.ground.threads import useful_threads
from shardsmith.hf.hf_directory import CONFIG_FILE, protect
from shardsmith.hf.live_config import settings_of_directory
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.manifest.metadata import CheckpointMetadata, now, read_metadata
from shardsmith.run_state.described import NO_RANK, Description, RankHolds, describe
from shardsmith.run_state.held import Entry, items
from shardsmith.run_state.whole_directory import OwnFile, WholeDirectory, to_receipt, write_content
from shardsmith.sharding.holding import pack_flags
from shardsmith.tensors.tensors import Chunk, read_into

_BYTES_OF_A_FILE = 1 << 30
_MOST_BYTES_OF_A_CONFIG = 32 << 20


@dataclass(frozen=True, slots=True)
class WholeCounts:
    """What such a directory holds, or is to hold."""

    step: int
    tensors: int
    nbytes: int
    """Of the tensors."""


def write_plain_dcp(checkpoint: Path, output: Path, *, dry_run: bool = False) -> WholeCounts:
    """Write all that a checkpoint of ours holds as a DCP directory; what that is. One process.

    Its values are compared with the digests that the checkpoint recorded. Tied tensors are there under each name.

    Args:
        checkpoint: A committed checkpoint with an index of DCP, which is only read.
        output: The directory to make.
        dry_run: Write nothing; the files of the checkpoint are looked at all the same.

    Raises:
        UsageError: it is in files of single ranks.
        CorruptCheckpointError: it does not hold what was saved. Nothing was written.
        TargetExistsError, WriteError: the output cannot be written.
    """
    protect(output, checkpoint)
    metadata = read_metadata(checkpoint)
    if not (checkpoint / layout.DCP_INDEX_FILE).exists():
        raise UsageError(f"{checkpoint} has no {layout.DCP_INDEX_FILE}: files of single ranks are not converted")
    # Weights are not hashed here: they are read once, below, and compared with their digests.
    if damage := find_damage(checkpoint, unread=".safetensors", manifest=metadata):
        raise CorruptCheckpointError(checkpoint, "\n  ".join(["is damaged; nothing was written", *damage]))
    with contextlib.closing(open_step(checkpoint, metadata)) as source:
        nbytes = sum(spec.nbytes for spec in source.specs.values())
        if dry_run:
            refuse_existing(output)
        else:
            with begin_attempt(output) as attempt:
                # A store does not say how much room it has.
                if isinstance(attempt, Attempt):
                    require_space(attempt.directory, nbytes)
                _commit(source, metadata, attempt)
    return WholeCounts(metadata.step, len(metadata.tensors), nbytes)


def _commit(source: DcpSource, metadata: CheckpointMetadata, attempt: AnyAttempt) -> None:
    entries = [*_entries(source)]
    chosen = _shared_out(entries)
    # A file takes the place of a rank: the writer of a save can be used as it is.
    own = [OwnFile.of(rank, entries, mine) for rank, mine in enumerate(chosen)]

    def write(one: OwnFile) -> dict[str, object]:
        written = write_rank_file(one.file, _values(source, one), _objects(source, one), attempt.directory)
        return to_receipt(written)

    with ThreadPoolExecutor(useful_threads(_BYTES_OF_A_FILE * len(own), len(own)), "shardsmith-write") as pool:
        # In the order of the files, whichever ends first.
        receipts = [*pool.map(write, own)]
    text, lists = describe(entries, NO_RANK)
    description = Description(text)
    held = [RankHolds(number, description, lists) for number in range(len(own))]
    whole = WholeDirectory(held, [pack_flags(_flags(entries, mine)) for mine in chosen])
    measured = whole.measured(receipts)
    # Before anything is visible: the values as they were written now, and the digests of the save.
    wrong = [key for key, record in metadata.tensors.items() if str(measured.digests.get(key)) != record.digest]
    if wrong:
        raise CorruptCheckpointError(source.path, f"other values than were saved: {', '.join(wrong)}; nothing written")
    for name, content in {**whole.indexes(receipts, attempt.id), **_settings(source.path)}.items():
        measured.files[name] = write_content(attempt, name, content)
    names = recorded_names(source.path, metadata)
    again = replace(
        metadata,
        attempt=attempt.id,
        created_at=now(),
        files=measured.files,
        weights=None,
        names=None if names is None else names.to_plain(),
    )
    sizes = {name: record.size for name, record in measured.files.items()}
    sizes[layout.METADATA_FILE] = attempt.write(layout.METADATA_FILE, again.to_json())
    attempt.commit(sizes)


def _settings(checkpoint: Path) -> dict[str, bytes]:
    """``model_config.json``: as the step has it, or of an older one as the Hugging Face directory says that it is."""
    if (file := checkpoint / layout.MODEL_CONFIG_FILE).is_file():
        return {file.name: read_bounded(file, _MOST_BYTES_OF_A_CONFIG)}
    settings = settings_of_directory(checkpoint) if (checkpoint / CONFIG_FILE).is_file() else None
    return {} if settings is None else {file.name: settings.to_json()}


def _entries(source: DcpSource) -> Iterator[Entry]:
    paths = source.index.containers
    for key, spec in source.specs.items():
        yield Entry(key, tuple(paths[key]), spec.shape, spec.dtype, (Chunk.whole(spec.shape),))
    for key in source.index.objects:
        yield Entry(key, tuple(paths[key]), None, None, ())


def _shared_out(entries: Sequence[Entry]) -> list[list[tuple[int, int]]]:
    """What each file holds: neighbours, about equally many bytes."""
    sizes = [0 if e.dtype is None else e.boxes[0].numel * e.dtype.itemsize for e in entries]
    files: list[list[tuple[int, int]]] = [[]]
    held = 0
    for i, position in items(entries):
        # A file is full once it has reached its size: a tensor is never divided between two.
        if held >= _BYTES_OF_A_FILE:
            files.append([])
            held = 0
        files[-1].append((i, position))
        held += sizes[i]
    return files


def _flags(entries: Sequence[Entry], mine: Sequence[tuple[int, int]]) -> np.ndarray:
    """By entry, each of which is one box: whether it is among these."""
    flags = np.zeros(len(entries), dtype=bool)
    flags[[i for i, _ in mine]] = True
    return flags


def _values(source: DcpSource, own: OwnFile) -> Iterator[Tensor]:
    """One after the other, so that little is in memory."""
    for piece in own.pieces:
        out = torch.empty(piece.box.sizes, dtype=piece.dtype, device="cpu")
        yield read_into(source, piece.key, piece.box, out)


def _objects(source: DcpSource, own: OwnFile) -> Iterator[bytes]:
    """The archives as they are; nothing is unpickled."""
    for key in own.file.objects:
        place = source.index.objects[key]
        with contextlib.closing(MappedFile(source.path / place.file)) as file:
            yield file.bytes(place.offset, place.length)
