"""Boxes of live weights, in whatever order a rank has them, are dealt as if each were looked at by itself."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardsmith.export.live_share import OwnBoxes, deal_boxes
from shardsmith.sharding.live_boxes import LiveBox
from shardsmith.tensors.tensors import Chunk, Shape
from tests.sharding.meshes import boxes_on, meshes, one_after_the_other, ranks_of, sharded


@given(st.data())
def test_boxes_in_any_order_are_dealt_as_each_alone(data: st.DataObject) -> None:
    mesh = data.draw(meshes)
    ways = [data.draw(sharded(mesh)) for _ in range(data.draw(st.integers(1, 4)))]
    shapes: dict[str, Shape] = {f"t{i}": (2, *shape) for i, (shape, _) in enumerate(ways)}
    itemsizes = {name: data.draw(st.sampled_from([2, 4])) for name in shapes}
    held: list[list[LiveBox]] = []
    for rank in ranks_of(mesh):
        # Each half is a box: as of a tensor that is put together of two, whose parts come far from each other.
        halves = [
            LiveBox(f"t{i}", shapes[f"t{i}"], Chunk((half, *box.offsets), (1, *box.sizes)), torch.empty(0))
            for half in range(2)
            for i, (shape, placements) in enumerate(ways)
            for box in boxes_on(shape, mesh, placements, rank)
        ]
        held.append(halves)
    own = [OwnBoxes(shapes, boxes) for boxes in held]
    answers = deal_boxes(shapes, itemsizes, [one.said for one in own])
    found = [
        [(boxes[i].name, boxes[i].box) for i in one.chosen(answer)]
        for boxes, one, answer in zip(held, own, answers, strict=True)
    ]
    in_order = [[(box.name, box.box) for box in sorted(boxes, key=lambda box: int(box.name[1:]))] for boxes in held]
    assert found == one_after_the_other(in_order, shapes, itemsizes)
