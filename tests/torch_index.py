"""``.metadata`` as torch's own objects and Python's pickler make it: what ours must write, byte for byte."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
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

from shardsmith.formats.dcp.cuts import CutTensor
from shardsmith.formats.dcp.shard_files import Place
from shardsmith.tensors.checkpoint_keys import KeyPath


def torch_index(
    tensors: Mapping[str, CutTensor],
    files: Sequence[str],
    containers: Mapping[str, KeyPath],
    attempt: str,
    objects: Mapping[str, Place],
) -> bytes:
    """Return the content of ``.metadata``. The arguments are those of ``write_index``."""
    metadata = Metadata({}, {}, {}, StorageMeta(save_id=attempt), CURRENT_DCP_VERSION)
    for key, (cut, numbers, offsets) in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in cut.boxes]
        properties = TensorProperties(dtype=cut.dtype)
        metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, torch.Size(cut.shape), chunks)
        metadata.planner_data[key] = containers.get(key, (key,))
        places = zip(cut.boxes, numbers.tolist(), offsets.tolist(), cut.lengths.tolist(), strict=True)
        for i, (box, file, offset, length) in enumerate(places):
            metadata.storage_data[MetadataIndex(key, box.offsets, i)] = _StorageInfo(files[file], offset, length)
    names = {name: name for name in files}
    for key, place in objects.items():
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.planner_data[key] = containers.get(key, (key,))
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo(names[place.file], place.offset, place.length)
    out = io.BytesIO()
    pickler = pickle.Pickler(out, protocol=4)
    # Only for this pickler: copyreg itself is of the whole process.
    pickler.dispatch_table = copyreg.dispatch_table | {TensorProperties: _reduced}
    pickler.dump(metadata)
    return out.getvalue()


def _reduced(properties: Any) -> tuple[Any, ...]:
    """As torch up to 2.14 writes them: from 2.15 on there are strides, too."""
    made_by, arguments, state, *_ = properties.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
    return made_by, arguments, state[:5]
