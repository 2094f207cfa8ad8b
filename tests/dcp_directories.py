"""DCP directories written by torch itself, in this process."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType


def save(state_dict: dict[str, Any], directory: Path) -> Path:
    """``dcp.save`` without its warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state_dict, checkpoint_id=directory)
    return directory


def save_sharded(
    state_dict: Mapping[str, Tensor], directory: Path, ranks: int, *, dim: int = 0, nested: str | None = None
) -> Path:
    """What ``dcp.save`` writes where each tensor is sharded over some ranks, along a dimension if it has that.

    Args:
        state_dict: The tensors to save.
        directory: The directory.
        ranks: Number of ranks.
        dim: The dimension to shard along.
        nested: Name of the dict that the tensors are in, such as "model".
    """
    keys = {f"{nested}.{name}" if nested else name: name for name in state_dict}
    paths = {key: (nested, name) if nested else (key,) for key, name in keys.items()}
    tensors = {key: state_dict[name] for key, name in keys.items()}
    writer = FileSystemWriter(directory, sync_files=False)
    writer.set_up_storage_writer(is_coordinator=True)
    plans = [
        SavePlan([item for key in tensors for item in _shard(key, tensors[key], i, ranks, dim)]) for i in range(ranks)
    ]
    plans, metadata = create_default_global_save_plan(plans)
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    results = [writer.write_data(plan, _Slices(tensors)).wait() for plan in plans if plan.items]
    writer.finish(dataclasses.replace(metadata, planner_data=paths), results)
    return directory


class _Slices(DefaultSavePlanner):
    """Hands out what the write items ask for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        chunk = write_item.tensor_data.chunk
        index = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        return self.tensors[write_item.index.fqn][index].detach().clone()


def _shard(key: str, tensor: Tensor, rank: int, ranks: int, dim: int) -> Iterator[WriteItem]:
    """The part of a tensor that a rank has, as FSDP2 cuts: equal parts, the last ones smaller or empty."""
    dim = min(dim, tensor.dim() - 1)
    size = tensor.shape[dim] if tensor.dim() else 1
    part = -(-size // ranks)
    start = min(rank * part, size)
    count = min(part, size - start)
    if count == 0:
        return
    offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
    if tensor.dim():
        offsets[dim], sizes[dim] = start, count
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), tensor.size())
    yield WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def load(state_dict: dict[str, Any], directory: Path) -> dict[str, Any]:
    """``dcp.load`` without the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state_dict, checkpoint_id=directory)
    return state_dict


def edit_index(directory: Path, edit: Callable[[Metadata], object]) -> None:
    """Change what the index of a directory says."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    edit(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
