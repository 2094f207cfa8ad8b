"""Whatever ranks hold, each element is written by exactly one that has it; holes and overlaps are refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardsmith.errors import RanksDisagreeError
from shardsmith.sharding.assignment import Held, assign_boxes
from shardsmith.tensors.tensors import Chunk, Shape
from tests.sharding.meshes import boxes_on, meshes, one_after_the_other, ranks_of, sharded

RANKS = 5


def cells(shape: Shape, cuts: Sequence[set[int]]) -> list[Chunk]:
    """The boxes into which a tensor falls when it is cut all the way through, in each dimension at some places."""
    edges = [sorted({0, size, *(cut % size for cut in places)}) for size, places in zip(shape, cuts, strict=True)]
    spans = [[(start, end - start) for start, end in itertools.pairwise(ends)] for ends in edges]
    return [Chunk(tuple(s for s, _ in box), tuple(n for _, n in box)) for box in itertools.product(*spans)]


@st.composite
def tensors(draw: st.DrawFn) -> list[tuple[Shape, list[tuple[Chunk, set[int]]]]]:
    """Some tensors, each with its boxes and the ranks that hold them: one or several, in any way."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
        boxes = cells(shape, [draw(st.sets(st.integers(0, 6), max_size=3)) for _ in shape])
        holders = st.sets(st.integers(0, RANKS - 1), min_size=1)
        found.append((shape, [(box, draw(holders)) for box in boxes]))
    return found


def assign(held: Sequence[Sequence[Held]], shapes: dict[str, Shape], itemsize: int = 4) -> list[list[Held]]:
    return assign_boxes(held, shapes, dict.fromkeys(shapes, itemsize))


def holdings(found: list[tuple[Shape, list[tuple[Chunk, set[int]]]]]) -> tuple[list[list[Held]], dict[str, Shape]]:
    held: list[list[Held]] = [[] for _ in range(RANKS)]
    for i, (_, boxes) in enumerate(found):
        for box, ranks in boxes:
            for rank in ranks:
                held[rank].append((f"t{i}", box))
    return held, {f"t{i}": shape for i, (shape, _) in enumerate(found)}


@given(tensors())
def test_each_element_is_written_once_and_by_a_rank_that_has_it(
    found: list[tuple[Shape, list[tuple[Chunk, set[int]]]]],
) -> None:
    held, shapes = holdings(found)
    written = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
    for mine, boxes in zip(held, assign(held, shapes), strict=True):
        assert set(boxes) <= set(mine)
        for name, box in boxes:
            written[name][tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))] += 1
    assert all(bool(times.eq(1).all()) for times in written.values())


@given(tensors(), st.integers(1, 8))
def test_each_box_goes_to_the_holder_that_has_the_least_to_do(
    found: list[tuple[Shape, list[tuple[Chunk, set[int]]]]], itemsize: int
) -> None:
    held, shapes = holdings(found)
    itemsizes = {name: itemsize + i % 2 for i, name in enumerate(shapes)}
    assert assign_boxes(held, shapes, itemsizes) == one_after_the_other(held, shapes, itemsizes)


@given(st.data())
def test_tensors_on_a_mesh_that_are_sharded_alike_are_dealt_as_if_each_were_alone(data: st.DataObject) -> None:
    """HSDP and tensor parallel replicas, uneven shards, ranks that hold nothing of a tensor, pipeline stages."""
    mesh = data.draw(meshes)
    ways = data.draw(st.lists(sharded(mesh), min_size=1, max_size=3))
    held: list[list[Held]] = [[] for _ in ranks_of(mesh)]
    shapes, itemsizes = {}, {}
    for i, way in enumerate(data.draw(st.lists(st.integers(0, len(ways) - 1), min_size=1, max_size=12))):
        shapes[f"t{i}"], placements = ways[way]
        itemsizes[f"t{i}"] = data.draw(st.sampled_from([2, 4]))
        stages = data.draw(st.sampled_from([1, 1, mesh[0]]))  # one stage for each place in the mesh's first dimension
        for rank, boxes in enumerate(held):
            where = rank // (len(held) // mesh[0])
            if stages == 1 or (where == i % stages and placements[0] is None):
                boxes += ((f"t{i}", box) for box in boxes_on(shapes[f"t{i}"], mesh, placements, rank))
        if not any(name == f"t{i}" for boxes in held for name, _ in boxes):
            del shapes[f"t{i}"]
    assert assign_boxes(held, shapes, itemsizes) == one_after_the_other(held, shapes, itemsizes)


@given(tensors(), st.data())
def test_a_box_that_nobody_holds_is_a_hole_in_a_tensor_that_is_named(
    found: list[tuple[Shape, list[tuple[Chunk, set[int]]]]], data: st.DataObject
) -> None:
    i = data.draw(st.integers(0, len(found) - 1))
    lost, _ = found[i][1].pop(data.draw(st.integers(0, len(found[i][1]) - 1)))
    with pytest.raises(RanksDisagreeError, match=rf"\n  t{i}: {lost.numel} of \d+ elements are on no rank$"):
        assign(*holdings(found))


@given(tensors(), st.data())
def test_boxes_that_overlap_without_being_the_same_are_refused(
    found: list[tuple[Shape, list[tuple[Chunk, set[int]]]]], data: st.DataObject
) -> None:
    i = data.draw(st.integers(0, len(found) - 1))
    shape, boxes = found[i]
    found[i] = (shape := (2, *shape), [(Chunk((0, *b.offsets), (2, *b.sizes)), ranks) for b, ranks in boxes])
    found[i][1].append((Chunk((0,) * len(shape), (1,) * len(shape)), {0}))  # a corner of the first
    with pytest.raises(RanksDisagreeError, match=rf"\n  t{i}: ranks hold .* and .*, which overlap$"):
        assign(*holdings(found))


def test_every_tensor_at_fault_is_named() -> None:
    half, whole = Chunk((0,), (2,)), Chunk((0,), (4,))
    with pytest.raises(RanksDisagreeError) as error:
        assign([[("hole", half), ("twice", half), ("good", whole)], [("twice", whole)]], SHAPES)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["hole", "twice", "absent"]


SHAPES: dict[str, Shape] = {"hole": (4,), "twice": (4,), "good": (4,), "absent": ()}


def test_empty_tensors_need_nobody() -> None:
    assert assign([[], []], {"nothing": (0, 4)}) == [[], []]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_replicas_share_the_work_evenly(sizes: list[int], ranks: int) -> None:
    held = [[(f"t{i}", Chunk((0,), (size,))) for i, size in enumerate(sizes)] for _ in range(ranks)]
    loads = [sum(box.numel for _, box in boxes) for boxes in assign(held, {f"t{i}": (n,) for i, n in enumerate(sizes)})]
    assert max(loads) - min(loads) <= max(sizes)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40))
def test_replicas_make_up_for_what_only_one_rank_holds(sizes: list[int]) -> None:
    """Rank 0 alone holds a tensor as large as all the others, so rank 1 writes those."""
    shapes = {"alone": (sum(sizes),), **{f"t{i}": (size,) for i, size in enumerate(sizes)}}
    held = [[(name, Chunk.whole(shape)) for name, shape in shapes.items()] for _ in range(2)]
    held[1] = held[1][1:]
    assert [name for name, _ in assign(held, shapes)[0]] == ["alone"]


def test_the_bytes_that_are_written_are_what_is_balanced() -> None:
    shapes: dict[str, Shape] = {"a": (100,), "b": (100,), "c": (100,), "d": (100,), "wide": (100,)}
    held = [[(name, Chunk.whole(shape)) for name, shape in shapes.items()] for _ in range(2)]
    dealt = assign_boxes(held, shapes, {**dict.fromkeys(shapes, 2), "wide": 8})
    assert sorted(len(boxes) for boxes in dealt) == [1, 4]


def test_the_order_is_that_of_the_tensors_and_the_same_each_time() -> None:
    shapes: dict[str, Shape] = {"b": (6,), "a": (6,)}
    held = [[(name, box) for name in ("a", "b") for box in cells((6,), [{4, 2}])]]
    first = assign(held, shapes)
    assert first == assign(held, shapes) == [sorted(held[0], key=lambda box: (box[0] == "a", box[1].offsets))]
