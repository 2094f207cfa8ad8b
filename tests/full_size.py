"""A checkpoint of the sharded fork with BAGEL's names and shapes: 29 billion numbers on paper, a few MB on disk."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from examples.bagel.model import FULL_SIZE, build, write_configs
from shardsmith.formats.safetensors_files.header import build_header
from shardsmith.tensors.tensors import TensorSpec
from tests.bagel_base import PATCHES

RANKS = 8


def specs() -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build(FULL_SIZE).state_dict().items()}


def write_step(directory: Path) -> None:
    """Main and average, float32, sharded over 8 ranks along the first dimension."""
    directory.mkdir()
    facts = {"train_steps": 7, "world_size": RANKS, "checkpoint_type": "sharded", "has_ema": True}
    (directory / "metadata.json").write_text(json.dumps(facts))
    for stem in ("model", "ema"):
        write_sparse_dcp(directory / f"{stem}_sharded", specs())


def write_sparse_dcp(directory: Path, shapes: dict[str, torch.Size]) -> None:
    """Only the patch embedding, of which the values are looked at, has bytes of its own."""
    directory.mkdir()
    entries, places, ends = {}, {}, [0] * RANKS
    files = [(directory / f"__{rank}_0.distcp").open("wb") for rank in range(RANKS)]
    for name, shape in shapes.items():
        chunks = []
        for rank, part in enumerate(torch.arange(shape[0]).chunk(RANKS)):
            offsets, sizes = (int(part[0]), *(0,) * (len(shape) - 1)), (len(part), *shape[1:])
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            length = 4 * torch.Size(sizes).numel() + 1200
            if name == PATCHES:
                buffer = io.BytesIO()
                torch.save(torch.full(sizes, 0.5), buffer)
                files[rank].seek(ends[rank])
                files[rank].write(buffer.getvalue())
                length = len(buffer.getvalue())
            info = _StorageInfo(relative_path=f"__{rank}_0.distcp", offset=ends[rank], length=length)
            places[MetadataIndex(name, chunk.offsets, rank)] = info
            ends[rank] += length
            chunks.append(chunk)
        properties = TensorProperties(dtype=torch.float32)
        entries[name] = TensorStorageMetadata(properties=properties, size=shape, chunks=chunks)
    for file, end in zip(files, ends, strict=True):
        file.truncate(end)
        file.close()
    (directory / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=places)))


def write_base(directory: Path) -> None:
    """The release: bfloat16, as ema.safetensors alone."""
    write_configs(FULL_SIZE, directory)
    found = [TensorSpec(name, tuple(shape), torch.bfloat16) for name, shape in specs().items()]
    header = build_header(found)
    with (directory / "ema.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in found))
    (directory / "ae.safetensors").touch()
