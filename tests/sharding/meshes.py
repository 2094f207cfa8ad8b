"""Who holds what on any mesh of ranks, as DTensors are sharded, and who is to write it: worked out box by box."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st

from shardsmith.tensors.tensors import Chunk, Shape

Held = tuple[str, Chunk]
Placements = tuple[int | None, ...]
"""By dimension of the mesh: the dimension of the tensor that is cut there, or None for a replica."""


def boxes_on(shape: Shape, mesh: Sequence[int], placements: Placements, rank: int) -> list[Chunk]:
    """The box of one rank, or none where nothing is left for it."""
    held = [torch.arange(size) for size in shape]
    stride = torch.arange(torch.tensor(mesh).prod()).reshape(*mesh)
    for where, size, dim in zip((stride == rank).nonzero()[0].tolist(), mesh, placements, strict=True):
        if dim is not None:
            parts = held[dim].chunk(size)
            held[dim] = parts[where] if where < len(parts) else held[dim][:0]
    if any(len(indices) == 0 for indices in held):
        return []
    return [Chunk(tuple(int(indices[0]) for indices in held), tuple(map(len, held)))]


@st.composite
def sharded(draw: st.DrawFn, mesh: Sequence[int]) -> tuple[Shape, Placements]:
    """The shape of a tensor, uneven more often than not, and how it lies on the mesh."""
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
    dims = st.one_of(st.none(), st.integers(0, len(shape) - 1)) if shape else st.none()
    return shape, tuple(draw(dims) for _ in mesh)


meshes = st.lists(st.integers(1, 4), min_size=1, max_size=3)


def one_after_the_other(
    held: Sequence[Sequence[Held]], shapes: Mapping[str, Shape], itemsizes: Mapping[str, int]
) -> list[list[Held]]:
    """As ``assign_boxes``, of what is covered: each box by itself, to the least loaded of its holders."""
    holders: dict[Held, list[int]] = {}
    for rank, boxes in enumerate(held):
        for box in boxes:
            holders.setdefault(box, []).append(rank)
    nbytes = {(name, box): box.numel * itemsizes[name] for name, box in holders}
    chosen: list[list[Held]] = [[] for _ in held]
    load = [0] * len(held)
    for box, ranks in sorted(holders.items(), key=lambda item: (len(item[1]) > 1, -nbytes[item[0]])):
        rank = min(ranks, key=load.__getitem__)
        load[rank] += nbytes[box]
        chosen[rank].append(box)
    order = {name: i for i, name in enumerate(shapes)}
    return [sorted(boxes, key=lambda box: (order[box[0]], box[1].offsets)) for boxes in chosen]


def ranks_of(mesh: Sequence[int]) -> range:
    """The ranks of a mesh."""
    return range(len(list(itertools.product(*map(range, mesh)))))
