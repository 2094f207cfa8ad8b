"""Making the record of a trainer's folder: all its files are read, divided among the ranks, and made durable."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardsmith.errors import CorruptCheckpointError
from shardsmith.formats.adopt import adopt
from shardsmith.formats.dcp.index import read_index
from shardsmith.ground import layout
from shardsmith.ground.commit import sync, writing
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.checkpoints import hash_file
from shardsmith.manifest.companion import FolderRecord
from shardsmith.manifest.metadata import FileRecord, TensorRecord, read_metadata
from shardsmith.tensors.checkpoint_keys import MAIN, find_models

SHARDED_MODEL = "pytorch_model_fsdp_0"
"""Where accelerate puts a model's shards, for itself and for Trainer: a DCP directory."""


@dataclass(frozen=True, slots=True)
class LiveModel:
    """The model that a trainer has just saved."""

    tensors: dict[str, TensorRecord]
    """As it is in memory, by clean FQN; tied ones once."""
    tied: dict[str, str]
    """Alias -> kept FQN."""


def record_folder(ranks: Ranks, folder: Path, step: int, live: LiveModel) -> FolderRecord:
    """Read everything that a trainer has written to a folder. All ranks, from any thread; communicates over the store.

    A DCP directory with the model's shards is recorded as one of ours, with ``metadata.json``, and compared with the
    live model.

    Raises:
        CorruptCheckpointError: the shards are not what the live model was.
        RankFailedError: this, or an error in reading, on all ranks where there are several.
    """
    sharded = ranks.lead(f"looking into {folder.name}", lambda: (folder / SHARDED_MODEL).is_dir())
    files = _adopt_model(ranks, folder, step, live) if sharded else {}
    skipped = f"{SHARDED_MODEL}/" if sharded else None
    # One rank lists, for all: two listings could differ while a file system is slow to show new files.
    names = ranks.lead(f"listing {folder.name}", lambda: _list_files(folder, skipped))
    # Largest first and dealt in turn, so each rank reads about as much.
    mine = names[ranks.rank :: ranks.size]

    def look() -> dict[str, list[Any]]:
        with writing(folder, "reading what the trainer wrote"):
            return {name: [found.size, found.xxh3_128] for name, found in _record_files(folder, mine).items()}

    for share in ranks.gather(f"reading {folder.name}", look, large=True):
        files |= {name: FileRecord(size=size, xxh3_128=text) for name, (size, text) in share.items()}
    return FolderRecord(step=step, files=dict(sorted(files.items())), tensors=live.tensors)


def _adopt_model(ranks: Ranks, folder: Path, step: int, live: LiveModel) -> dict[str, FileRecord]:
    """Record the shards of the model and compare them with the live one; their files, by path in the folder."""
    directory = folder / SHARDED_MODEL
    adopt(directory, step=step, tied=live.tied, ranks=ranks)
    ranks.lead(f"comparing {folder.name}", lambda: _compare(directory, live.tensors))
    return {f"{SHARDED_MODEL}/{name}": record for name, record in read_metadata(directory).files.items()}


def _compare(directory: Path, live: Mapping[str, TensorRecord]) -> None:
    index, written = read_index(directory), read_metadata(directory).tensors
    keys = find_models(index.tensors, index.containers).get(MAIN, {})
    if wrong := sorted(name for name, key in keys.items() if name in live and written[key] != live[name]):
        lines = "\n  ".join(wrong)
        raise CorruptCheckpointError(directory, f"does not hold the tensors of the model; these differ\n  {lines}")


def _list_files(folder: Path, skipped: str | None) -> list[str]:
    """The trainer's files, by path in the folder, largest first. Ours, links and special files are left out."""
    found = []
    for parent, folders, names in os.walk(folder):
        if Path(parent) == folder:
            # In place, which is how os.walk is told not to go into a folder. Ours is none of the trainer's.
            folders[:] = [name for name in folders if name != layout.COMPANION and not layout.is_leftover(name)]
        paths = [Path(parent, name) for name in names]
        found += [(path.stat().st_size, path) for path in paths if path.is_file() and not path.is_symlink()]
    listed = [path.relative_to(folder).as_posix() for _, path in sorted(found, reverse=True)]
    return [name for name in listed if skipped is None or not name.startswith(skipped)]


def _record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and hash of files of a folder, each made durable first. Raises OSError."""

    def record(name: str) -> FileRecord:
        path = folder / name
        # Before the hash: a hash of bytes that a crash then loses would call the folder complete.
        sync(path)  # the trainer has left it to the page cache
        return FileRecord(size=path.stat().st_size, xxh3_128=hash_file(path))

    names = list(names)
    with ThreadPoolExecutor(max(1, min(len(names), os.cpu_count() or 1)), "shardsmith-hash") as pool:
        return dict(zip(names, pool.map(record, names), strict=True))
