"""Shards as safetensors files, two a rank, where torch.distributed.checkpoint cannot be used: ``backend="per_rank"``.

    step-500/
        weights-rank-00000.safetensors    main weights and average: the boxes that rank 0 wrote
        state-rank-00000.safetensors      optimizer, scheduler, random number generators and so on
        ...
        metadata.json                     as of any checkpoint of ours: hashes, digests, global shapes

Each file says in its own header which box of which tensor it holds, so that any number of ranks can read any part. What
is no tensor is held as the bytes of ``torch.save``, and read with ``weights_only``.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardsmith.errors import CheckpointNotFoundError, CorruptCheckpointError, UsageError
from shardsmith.formats.safetensors_files.source import SafetensorsSource
from shardsmith.formats.torch_files.files import HeldTensor, MergedTensor, merge_ranks
from shardsmith.formats.torch_files.source import TorchSource
from shardsmith.ground.json_budget import require_json_budget
from shardsmith.manifest.fields import shape as shape_of
from shardsmith.manifest.fields import typed
from shardsmith.manifest.metadata import CheckpointMetadata, read_metadata
from shardsmith.tensors.checkpoint_keys import KeyPath
from shardsmith.tensors.tensors import Chunk, read_tensor

HEADER_KEY = "shardsmith"
"""In the free-form part of a file's header: JSON that says what its tensors are."""
_FILE = re.compile(r"(weights|state)-rank-[0-9]{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class Part:
    """What one tensor of a file is."""

    key: str
    box: Chunk
    shape: tuple[int, ...]
    """Of the global tensor."""
    is_object: bool
    """Whether it is the bytes of something that is no tensor."""

    def to_plain(self) -> list[Any]:
        """As JSON has it."""
        return [self.key, list(self.box.offsets), list(self.box.sizes), list(self.shape), self.is_object]


def file_name(kind: str, rank: int) -> str:
    """``kind`` is "weights" or "state"."""
    return f"{kind}-rank-{rank:05d}.safetensors"


class RankShards(TorchSource):
    """The tensors of all ranks by key (a ``TensorSource``).

    Attributes:
        objects: Keys of what is no tensor, held as uint8 tensors.
    """

    def __init__(self, directory: Path, manifest: CheckpointMetadata | None = None) -> None:
        """Open a directory.

        Args:
            directory: Of a checkpoint of ours.
            manifest: Its metadata.json, if that was read already.

        Raises:
            CheckpointNotFoundError, IncompleteCheckpointError, CorruptCheckpointError: files are missing, damaged, or
                not those of this checkpoint.
        """
        metadata = manifest or read_metadata(directory)
        names = sorted(name for name in metadata.files if _FILE.fullmatch(name))
        if not names:
            raise CheckpointNotFoundError(directory, "holds no files of single ranks")
        self.objects: set[str] = set()
        merged = merge_ranks(directory, [(name, _read(directory / name, self.objects)) for name in names])
        # Before anything is read: the header of a file of another step would be valid, too.
        _compare(directory, merged, metadata)
        super().__init__(directory, merged)

    def read_object(self, key: str) -> Any:
        """Something that is no tensor. Raises CheckpointNotFoundError if there is no such thing."""
        if key not in self.objects:
            raise CheckpointNotFoundError(self.path, f"has no object named {key!r}")
        return unpack_object(read_tensor(self, key))


def pack_object(value: Any) -> Tensor:
    """Something that is no tensor as the bytes of ``torch.save``, uint8. Raises UsageError if it could not be read."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    packed = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    try:
        # Read back at the save, where it can be changed, and not at a resume, where it is lost.
        unpack_object(packed)
    except Exception as error:
        raise UsageError(
            f"a {type(value).__name__} cannot be saved so that it can be read without running code"
        ) from error
    return packed


def unpack_object(packed: Tensor) -> Any:
    """Inverse of ``pack_object``; runs no code."""
    return torch.load(io.BytesIO(bytes(packed.numpy())), weights_only=True)


def _read(path: Path, objects: set[str]) -> dict[KeyPath, HeldTensor]:
    source = SafetensorsSource(path)
    (header,) = source.headers.values()
    found: dict[KeyPath, HeldTensor] = {}
    try:
        text = header.metadata[HEADER_KEY]
        require_json_budget(text.encode())
        for name, described in typed(json.loads(text), dict).items():
            key, *box_and_shape, is_object = typed(described, list)
            offsets, sizes, shape = map(shape_of, box_and_shape)
            objects |= {typed(key, str)} if typed(is_object, bool) else set()
            spec = source.specs[name]
            box = Chunk(offsets, sizes)
            if spec.shape != sizes:
                raise ValueError(f"{name} is {spec.shape}, not {sizes}")
            if any(start + size > extent for start, size, extent in zip(offsets, sizes, shape, strict=True)):
                raise ValueError(f"{name} is said to be {box}, which is not within {shape}")
            # A tensor may be in several parts of one file; a box without elements only says shape and dtype.
            mine = [(box, source.stored(name))] if box.numel else []
            held = found.get((key,))
            before = held.parts if held else ()
            found[(key,)] = HeldTensor(shape, spec.dtype, (*before, *mine), True)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        source.close()
        raise CorruptCheckpointError(path, f"does not say what it holds: {type(error).__name__}: {error}") from error
    return found


def _compare(directory: Path, merged: Mapping[KeyPath, MergedTensor], metadata: CheckpointMetadata) -> None:
    """The manifest and the files must speak of the same tensors."""
    found = {str(keys[0]): (tensor.shape, tensor.dtype) for keys, tensor in merged.items()}
    wanted = {key: (record.shape, getattr(torch, record.dtype)) for key, record in metadata.tensors.items()}
    if wrong := sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)):
        lines = "\n  ".join([f"metadata.json and the files differ about {len(wrong)} tensors", *wrong])
        raise CorruptCheckpointError(directory, lines)
