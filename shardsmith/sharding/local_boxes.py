"""Which part of a global tensor this rank holds, however it is sharded."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardsmith.tensors.tensors import Chunk

_known: weakref.WeakKeyDictionary[DeviceMesh, dict[Any, tuple[Chunk, ...]]] = weakref.WeakKeyDictionary()


def local_boxes(tensor: Tensor) -> list[tuple[Chunk, Tensor]]:
    """This rank's boxes of a global tensor, each with its values; none where it holds nothing.

    No communication. The values share memory with the tensor, on its device. A replica is a box like any other: ranks
    that hold the same one must agree who uses it.

    Args:
        tensor: A DTensor with any placements but ``Partial``, a ShardedTensor of FSDP1, or a plain tensor, which is
            whole on every rank.
    """
    if isinstance(tensor, ShardedTensor):
        pairs = [
            (Chunk(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes)), shard.tensor.detach())
            for shard in tensor.local_shards()
        ]
    elif isinstance(tensor, DTensor):
        values = _local_without_grad(tensor)
        pairs = [(chunk, values) for chunk in _chunks(tensor)]
    else:
        pairs = [(Chunk.whole(tuple(tensor.shape)), tensor.detach())]
    return [(box, values) for box, values in pairs if box.numel]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor is local already. Shares memory. Call it without grad."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_without_grad(tensor: DTensor) -> Tensor:
    """Costs less than to detach a DTensor; and less again where the caller has gone without grad for all of them."""
    if not torch.is_grad_enabled():
        return tensor.to_local()
    with torch.no_grad():
        return tensor.to_local()


def _chunks(tensor: DTensor) -> tuple[Chunk, ...]:
    """Where this rank's part lies. Worked out once for tensors that are sharded alike: a model has hundreds of them."""
    known = _known.setdefault(tensor.device_mesh, {})
    key = (tensor.placements, tensor.shape)
    if key not in known:
        chunks = tensor.__create_chunk_list__()
        known[key] = tuple(Chunk(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks)
    return known[key]
