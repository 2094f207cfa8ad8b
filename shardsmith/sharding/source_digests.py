"""Digests of the tensors of a source as they would be in given dtypes: its files are read once, divided among ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from shardsmith.ground.progress import advance
from shardsmith.ground.threads import one_thread_per_operator, useful_threads
from shardsmith.tensors.digest import Digest, digest_run
from shardsmith.tensors.narrowing import LostValues, is_narrower
from shardsmith.tensors.tensors import Chunk, TensorSource, read_into, row_major_blocks

_BLOCK_BYTES = 2 << 20

Block = tuple[str, int, Chunk]
"""Tensor, flat index of the first element, and where it lies."""


def digest_source(
    source: TensorSource,
    dtypes: Mapping[str, torch.dtype],
    *,
    part: int = 0,
    parts: int = 1,
    read: dict[str, int] | None = None,
    lost: LostValues | None = None,
) -> dict[str, Digest]:
    """Return the share of a part of all blocks in the digest of each tensor; over all parts, the shares add up to it.

    No communication. Memory: one block a thread.

    Args:
        source: The tensors to read.
        dtypes: Name of each tensor -> the dtype to cast it to first.
        part: Number of this share.
        parts: Number of shares.
        read: Where to count the bytes that were digested, by tensor.
        lost: Where to note finite values that are infinite in the dtype that they are cast to.

    Raises:
        CheckpointError: from reading.
    """
    mine = _share_of_blocks(list(_blocks(source, dtypes)), part, parts)
    digests = {name: Digest() for name in dtypes}
    threads = useful_threads(sum(box.numel * dtypes[name].itemsize for name, _, box in mine), len(mine))
    with one_thread_per_operator(), ThreadPoolExecutor(threads, "shardsmith-digest") as pool:
        digest = partial(_share, source, dtypes, lost)
        # In the order of the blocks either way: each share is paired with its own block.
        shares = map(digest, mine) if threads == 1 else pool.map(digest, mine)
        for (name, _, box), share in zip(mine, shares, strict=True):
            digests[name] += share
            advance(nbytes := box.numel * dtypes[name].itemsize)
            if read is not None:
                read[name] = read.get(name, 0) + nbytes
    return digests


def _blocks(source: TensorSource, dtypes: Mapping[str, torch.dtype]) -> Iterator[Block]:
    for name, dtype in dtypes.items():
        spec = source.specs[name]
        # A block fits the bound both as it is read and as it is digested.
        size = max(dtype.itemsize, spec.dtype.itemsize)
        for first, box in row_major_blocks(spec.shape, _BLOCK_BYTES // size):
            yield name, first, box


def _share_of_blocks(blocks: list[Block], part: int, parts: int) -> list[Block]:
    """Consecutive blocks with about one of ``parts`` shares of the elements."""
    # By elements and not by tensors: one large tensor is divided among all ranks.
    starts = [0, *itertools.accumulate(box.numel for _, _, box in blocks)]
    return [block for block, start in zip(blocks, starts, strict=False) if start * parts // starts[-1] == part]


def _share(source: TensorSource, dtypes: Mapping[str, torch.dtype], lost: LostValues | None, block: Block) -> Digest:
    name, first, box = block
    values, held = _values(source, name, box, dtypes[name]), source.specs[name].dtype
    if lost is not None and is_narrower(dtypes[name], held):
        lost.add(name, values, lambda: _values(source, name, box, held))
    return digest_run(values, first)


def _values(source: TensorSource, name: str, box: Chunk, dtype: torch.dtype) -> Tensor:
    if source.specs[name].dtype == dtype:
        # Without a cast a view of the source is digested as it is; only a cast needs memory of its own.
        pieces = list(source.pieces(name, box))
        if len(pieces) == 1 and pieces[0][0] == box and pieces[0][1].is_contiguous():
            return pieces[0][1]
    return read_into(source, name, box, torch.empty(box.sizes, dtype=dtype, device="cpu"))
