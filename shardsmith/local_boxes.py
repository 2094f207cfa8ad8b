"""Which part of a global tensor this rank holds, however it is sharded."""

from __future__ import annotations

from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardsmith.tensors import Chunk


def local_boxes(tensor: Tensor) -> list[tuple[Chunk, Tensor]]:
    """This rank's boxes of a global tensor, each with its values; none where it holds nothing.

    No communication. The values share memory with the tensor, on its device. A replica is a box like any other: ranks
    that hold the same one must agree who uses it.

    Args:
        tensor: A DTensor with any placements but ``Partial``, a ShardedTensor of FSDP1, or a plain tensor, which is
            whole on every rank.
    """
    tensor = tensor.detach()
    if isinstance(tensor, ShardedTensor):
        pairs = [
            (Chunk(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes)), shard.tensor)
            for shard in tensor.local_shards()
        ]
    elif isinstance(tensor, DTensor):
        chunks = [Chunk(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.__create_chunk_list__()]
        pairs = [(chunk, tensor.to_local()) for chunk in chunks]
    else:
        pairs = [(Chunk.whole(tuple(tensor.shape)), tensor)]
    return [(box, values) for box, values in pairs if box.numel]
