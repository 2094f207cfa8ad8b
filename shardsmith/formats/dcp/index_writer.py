"""The index of a DCP directory whose files torch did not write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from shardsmith.formats.dcp.box_index_writer import write_box_index
from shardsmith.formats.dcp.cuts import CutTensor
from shardsmith.formats.dcp.index_pickle_writer import write_index
from shardsmith.formats.dcp.shard_files import Place
from shardsmith.ground.layout import BOX_INDEX_FILE, DCP_INDEX_FILE
from shardsmith.tensors.checkpoint_keys import KeyPath


def write_indexes(
    tensors: Mapping[str, CutTensor],
    *,
    files: Sequence[str],
    containers: Mapping[str, KeyPath],
    attempt: str,
    aliases: Mapping[str, str] | None = None,
    objects: Mapping[str, Place] | None = None,
) -> dict[str, Iterable[bytes]]:
    """Return the content of ``.metadata``, and of ``.boxes``, which says the same to whoever loads; by name.

    In parts: those of ``.metadata`` are made when they are asked for, once, since together they may be many gigabytes.

    Args:
        tensors: By key.
        files: Names of the files in which the boxes lie, by number.
        containers: Key -> where it lies in a nested state dict.
        attempt: Recorded as the save id, in ``.metadata`` alone.
        aliases: Key -> the key whose boxes are its boxes, too.
        objects: Values that are no tensors, by key.
    """
    every = {**tensors, **{key: tensors[kept] for key, kept in (aliases or {}).items()}}
    index = write_index(every, files=files, containers=containers, attempt=attempt, objects=objects or {})
    boxes = write_box_index(every, files=files, containers=containers, objects=objects or {})
    return {DCP_INDEX_FILE: index, BOX_INDEX_FILE: [boxes]}
