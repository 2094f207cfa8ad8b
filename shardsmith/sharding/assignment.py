"""Who writes what: of all ranks that hold a box one is chosen, and every tensor is verified to be covered.

Nothing is assumed about the sharding: the ranks say which boxes they hold, so that replicas of any kind (DDP, HSDP,
tensor parallel ``Replicate``, FSDP1's hybrid shards) and pipeline stages are all the same case.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from shardsmith.errors import RanksDisagreeError
from shardsmith.sharding.boxes import find_overlap
from shardsmith.tensors.tensors import Chunk, Shape

Held = tuple[str, Chunk]
"""Name of a tensor and a box of it that a rank holds."""


def assign_boxes(
    held: Sequence[Iterable[Held]], shapes: Mapping[str, Shape], itemsizes: Mapping[str, int]
) -> list[list[Held]]:
    """For each rank the boxes that it is to write, so that every element is written once and the bytes are spread.

    Args:
        held: For each rank what it holds. Empty boxes are left out.
        shapes: Global shape of each tensor.
        itemsizes: Bytes of an element of each tensor, as it will be written.

    Raises:
        RanksDisagreeError: boxes overlap without being the same, or leave holes. Names every tensor at fault.
    """
    holders: dict[Held, list[int]] = {}
    for rank, boxes in enumerate(held):
        for box in boxes:
            holders.setdefault(box, []).append(rank)
    _check_coverage(holders, shapes)
    chosen: list[list[Held]] = [[] for _ in held]
    load = [0] * len(held)
    nbytes = {(name, box): box.numel * itemsizes[name] for name, box in holders}
    # those with one holder first, then the largest: what is left evens out the load
    for box, ranks in sorted(holders.items(), key=lambda item: (len(item[1]) > 1, -nbytes[item[0]])):
        rank = min(ranks, key=lambda rank: load[rank])
        load[rank] += nbytes[box]
        chosen[rank].append(box)
    order = {name: i for i, name in enumerate(shapes)}
    return [sorted(boxes, key=lambda box: (order[box[0]], box[1].offsets)) for boxes in chosen]


def _check_coverage(holders: Iterable[Held], shapes: Mapping[str, Shape]) -> None:
    boxes: dict[str, list[Chunk]] = {name: [] for name in shapes}
    for name, box in holders:
        boxes[name].append(box)
    problems = []
    for name, found in boxes.items():
        absent = math.prod(shapes[name]) - sum(box.numel for box in found)
        if overlap := find_overlap(found):
            problems.append(f"{name}: ranks hold {overlap[0]} and {overlap[1]}, which overlap")
        elif absent:
            problems.append(f"{name}: {absent} of {math.prod(shapes[name])} elements are on no rank")
    if problems:
        raise RanksDisagreeError("\n  ".join(["the ranks do not hold whole tensors; nothing was written", *problems]))
