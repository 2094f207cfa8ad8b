"""Which part of a global tensor this rank holds, however it is sharded."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from shardsmith.errors import UsageError
from shardsmith.tensors.tensors import Chunk

Part = tuple[Chunk, tuple[slice, ...]]
"""A box of the global tensor, and where it lies in this rank's values."""

_known: weakref.WeakKeyDictionary[DeviceMesh, dict[Any, tuple[Part, ...]]] = weakref.WeakKeyDictionary()


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
        values = tensor._local_tensor
        parts = _parts(tensor)
        if len(parts) == 1 and parts[0][0].numel and tuple(values.shape) != parts[0][0].sizes:
            _refuse_uneven(tensor, values, parts[0][0])
        pairs = [(box, values if len(parts) == 1 else values[where]) for box, where in parts]
    else:
        pairs = [(Chunk.whole(tuple(tensor.shape)), tensor.detach())]
    return [(box, values) for box, values in pairs if box.numel]


def _refuse_uneven(tensor: DTensor, values: Tensor, box: Chunk) -> NoReturn:
    raise UsageError(
        f"this rank holds values of shape {tuple(values.shape)} of a DTensor of shape {tuple(tensor.shape)} with "
        f"{tensor.placements} on a mesh of {tuple(tensor.device_mesh.shape)}, by which it would be {box.sizes}: "
        "torch does not know such uneven shards. Make it with distribute_tensor, or with equal parts"
    )


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor is local already. Shares memory, and not the gradient's graph."""
    # What ``to_local`` gives without grad, at a hundredth of its cost.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _parts(tensor: DTensor) -> tuple[Part, ...]:
    """Where this rank's part lies. Worked out once for tensors that are sharded alike: a model has hundreds of them."""
    known = _known.setdefault(tensor.device_mesh, {})
    key = (tensor.placements, tensor.shape)
    if key not in known:
        if any(isinstance(placement, _StridedShard) for placement in tensor.placements):
            known[key] = _strided_parts(tensor)
        else:
            chunks = tensor.__create_chunk_list__()
            known[key] = tuple((Chunk(tuple(chunk.offsets), tuple(chunk.sizes)), ()) for chunk in chunks)
    return known[key]


def _strided_parts(tensor: DTensor) -> tuple[Part, ...]:
    """Of a tensor of which a rank may hold every second block of rows, such as gate and up of packed experts.

    Torch describes all of these as one box, which would lie over those of other ranks.
    """
    place = tensor.device_mesh.get_coordinate()
    if place is None:
        return ()
    held = [torch.arange(size, device="cpu") for size in tensor.shape]
    for size, own, placement in zip(tensor.device_mesh.shape, place, tensor.placements, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            factor = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
            dim = placement.dim % tensor.ndim
            held[dim] = torch.cat([_split(block, size)[own] for block in _split(held[dim], factor)])
    runs = [_runs(indices) for indices in held]
    return tuple(
        (
            Chunk(tuple(first for first, _, _ in run), tuple(length for _, length, _ in run)),
            tuple(slice(begin, begin + length) for _, length, begin in run),
        )
        for run in itertools.product(*runs)
    )


def _split(indices: Tensor, count: int) -> list[Tensor]:
    """As a DTensor is split: the last of the ``count`` parts may be smaller, or empty."""
    parts = list(indices.chunk(count))
    return parts + [indices[:0]] * (count - len(parts))


def _runs(indices: Tensor) -> list[tuple[int, int, int]]:
    """First index, length and position of each run of ascending indices without a gap."""
    gaps = (indices.diff() != 1).nonzero().flatten() + 1
    ends = [0, *gaps.tolist(), len(indices)] if len(indices) else []
    return [(int(indices[begin]), end - begin, begin) for begin, end in itertools.pairwise(ends)]
