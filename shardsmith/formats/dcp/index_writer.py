"""The index of a DCP directory whose files torch did not write."""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shardsmith.formats.dcp.box_index_writer import write_box_index
from shardsmith.formats.dcp.shard_files import Place, PlannedChunk
from shardsmith.ground.layout import BOX_INDEX_FILE, DCP_INDEX_FILE
from shardsmith.tensors.checkpoint_keys import KeyPath
from shardsmith.tensors.tensors import TensorSpec


def write_indexes(
    specs: Mapping[str, TensorSpec],
    chunks: Sequence[PlannedChunk],
    places: Mapping[int, Place],
    *,
    files: Sequence[str],
    containers: Mapping[str, KeyPath],
    attempt: str,
    aliases: Mapping[str, str] | None = None,
    objects: Mapping[str, Place] | None = None,
) -> dict[str, bytes]:
    """Return the content of ``.metadata``, and of ``.boxes``, which says the same to whoever loads; by name.

    Args:
        specs: By key.
        chunks: The planned chunks.
        places: Number of a chunk -> where it lies in the files.
        files: Names of those.
        containers: Key -> where it lies in a nested state dict.
        attempt: Recorded as the save id, in ``.metadata`` alone.
        aliases: Key -> the key whose chunks are its chunks, too.
        objects: Values that are no tensors, by key.
    """
    aliases, objects = aliases or {}, objects or {}
    index = write_index(specs, chunks, places, aliases=aliases, containers=containers, attempt=attempt, objects=objects)
    boxes = write_box_index(specs, chunks, places, files=files, aliases=aliases, containers=containers, objects=objects)
    return {DCP_INDEX_FILE: index, BOX_INDEX_FILE: boxes}


def write_index(
    specs: Mapping[str, TensorSpec],
    chunks: Sequence[PlannedChunk],
    places: Mapping[int, Place],
    *,
    aliases: Mapping[str, str],
    containers: Mapping[str, KeyPath],
    attempt: str,
    objects: Mapping[str, Place] | None = None,
) -> bytes:
    """Return the content of ``.metadata``, as torch's own writer would make it.

    Args:
        specs: By key.
        chunks: The planned chunks.
        places: Number of a chunk -> where it lies in the files.
        aliases: Key -> the key whose chunks are its chunks, too.
        containers: Key -> where it lies in a nested state dict.
        attempt: Recorded as the save id.
        objects: Values that are no tensors, by key.
    """
    # Imported here: torch.distributed.checkpoint takes long to import, and commands that write no index do without.
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    numbers: dict[str, list[int]] = {}
    for i, chunk in enumerate(chunks):
        numbers.setdefault(chunk.key, []).append(i)
    metadata = Metadata({}, {}, {}, StorageMeta(save_id=attempt), CURRENT_DCP_VERSION)
    for key, kept in [*((key, key) for key in specs), *aliases.items()]:
        boxes = [
            ChunkStorageMetadata(torch.Size(chunks[i].box.offsets), torch.Size(chunks[i].box.sizes))
            # Empty chunks are listed, too, as torch's planner does.
            for i in numbers[kept]
        ]
        properties = TensorProperties(dtype=specs[kept].dtype)
        metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, torch.Size(specs[kept].shape), boxes)
        metadata.planner_data[key] = containers.get(key, (key,))
        # The key is (fqn, offsets); the position is torch's hint where in the chunk list to look first.
        for position, i in enumerate(numbers[kept]):
            place = places[i]
            index = MetadataIndex(key, chunks[i].box.offsets, position)
            metadata.storage_data[index] = _StorageInfo(place.file, place.offset, place.length)
    for key, place in (objects or {}).items():
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.planner_data[key] = containers.get(key, (key,))
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo(place.file, place.offset, place.length)
    out = _Pieces()
    pickler = pickle.Pickler(out)
    # Only for this pickler: copyreg itself is of the whole process.
    pickler.dispatch_table = copyreg.dispatch_table | {TensorProperties: _reduced}
    pickler.dump(metadata)
    return b"".join(out.pieces)


class _Pieces:
    """Takes a pickle in pieces of some 64 KiB, in Python code, so that other threads get their turn at each.

    Into a file of C's the pickler writes for as long as a large index takes, which may be seconds, without giving up
    the interpreter's lock (GIL): the other ranks would hold this one dead, since it answers nobody.
    """

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, piece: bytes) -> int:
        self.pieces.append(bytes(piece))
        return len(piece)


def _reduced(properties: Any) -> tuple[Any, ...]:
    """As torch up to 2.14 writes them, and all versions read them: from 2.15 on there are strides, too."""
    made_by, arguments, state, *_ = properties.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
    return made_by, arguments, state[:5]
