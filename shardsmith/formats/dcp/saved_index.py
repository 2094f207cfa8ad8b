"""What the index of a DCP directory says, as plain values, and the names that its pickle uses for the boxes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardsmith.formats.torch_files.pickle_machine import Name
from shardsmith.tensors.tensors import Chunk, Shape

CHECKPOINT = "torch.distributed.checkpoint.metadata"
CHUNK = Name(CHECKPOINT, "ChunkStorageMetadata")
INDEX = Name(CHECKPOINT, "MetadataIndex")
STORAGE_INFO = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
SIZE = Name("torch", "Size")


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor and the boxes it was saved in: empty, repeated, overlapping or too few, as the index has them."""

    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class SavedBytes:
    """Where something lies: a byte range of a file."""

    file: str
    """Whatever the index says: not yet known to be a plain name."""
    offset: int
    length: int
    transforms: tuple[str, ...]
    """Names of what the bytes went through, such as compression."""


@dataclass(frozen=True, slots=True)
class SavedIndex:
    """What ``.metadata`` says, as far as it is needed to read the directory."""

    entries: dict[str, SavedTensor | None]
    """By key; None is a value that is no tensor."""
    containers: dict[str, tuple[str | int, ...]]
    """Where a key lay in the nested state dict; keys may be absent."""
    places: dict[tuple[str, Shape | None], SavedBytes]
    """By key and offsets of the chunk, None where the value is no tensor."""
