"""A slice is what the same steps make of a tensor, whole or shard by shard, and however it is told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardsmith.name_maps.grids import Axis, Grid
from shardsmith.name_maps.slices import Joined, Slice
from shardsmith.name_maps.tracing import trace
from shardsmith.tensors.tensors import Chunk, TensorSpec
from tests.slice_cases import Case, boxes, filled, shards, slices

W = Slice.whole(TensorSpec("w", (64, 6), torch.int32))


@given(slices())
def test_a_slice_is_what_the_same_steps_make_of_a_tensor(case: Case) -> None:
    grid, source = case.slice.grid, filled(case.shape)
    assert case.slice.shape == tuple(case.tensor.shape)
    assert grid.fits(case.shape)
    if grid.numel:
        whole = grid.view(source, Chunk.whole(case.shape), Chunk.whole(grid.shape))
        assert torch.equal(whole.reshape(case.slice.shape), case.tensor)


@given(slices(), st.data())
def test_shard_by_shard_a_slice_is_what_it_is_of_the_whole(case: Case, data: st.DataObject) -> None:
    grid, source = case.slice.grid, filled(case.shape)
    made = torch.full(grid.shape, -1, dtype=torch.int32)
    for box in data.draw(shards(case.shape)):
        shard = source[box.within(Chunk.whole(case.shape))].clone()
        for part in grid.cut(box):
            place = part.within(Chunk.whole(grid.shape))
            assert bool((made[place] == -1).all())
            made[place] = grid.view(shard, box, part)
    assert torch.equal(made.reshape(case.slice.shape), case.tensor)


@given(slices(), st.data())
def test_a_box_of_the_target_is_put_together_from_parts_of_it(case: Case, data: st.DataObject) -> None:
    target = case.slice.target
    box = data.draw(boxes(case.slice.shape))
    found = torch.full(box.sizes, -1, dtype=torch.int32)
    for part in target.cut(box):
        values = case.tensor.reshape(target.shape)[part.within(Chunk.whole(target.shape))]
        target.view(found, box, part).copy_(values)
    assert torch.equal(found, case.tensor[box.within(Chunk.whole(case.slice.shape))])


@given(slices())
def test_a_function_is_traced_to_the_slice_that_its_steps_make(case: Case) -> None:
    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        value = tensors["source"]
        for method, arguments in case.steps:
            value = getattr(value, method)(*arguments)
        return {"result": value}

    traced, refused = trace(run, {"source": TensorSpec("source", case.shape, torch.int32)})
    assert refused == []
    if case.tensor.numel():
        assert traced == {"result": case.slice}
    else:
        assert traced["result"].shape == case.slice.shape


def test_what_a_function_concatenates_and_stacks_is_traced() -> None:
    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = tensors["a"], tensors["b"]
        return {
            "cat": torch.cat([a[2:], b], dim=1),
            "stack": torch.stack([a[0], a[1]], dim=1),
            "again": torch.cat([torch.cat([a])]),
            "sum": a[:2] + b[:, :3],
            "part": torch.cat([a, a])[1:],
        }

    specs = {"a": TensorSpec("a", (4, 3), torch.float32), "b": TensorSpec("b", (2, 5), torch.float32)}
    traced, refused = trace(run, specs)
    whole = {name: Slice.whole(spec) for name, spec in specs.items()}
    columns = [whole["a"][i].reshape(3, 1) for i in range(2)]
    assert traced["cat"] == Joined((whole["a"][2:], whole["b"]), 1)
    assert traced["stack"] == Joined(tuple(columns), 1)
    assert traced["again"] == whole["a"]
    assert refused == ["sum", "part"]


def test_two_ways_to_say_the_same_give_equal_slices() -> None:
    there = W.reshape(4, 2, 8, 6).transpose(1, 2).reshape(64, 6)
    assert there != W
    assert there.reshape(4, 8, 2, -1).transpose(1, 2).reshape(64, 6) == W
    assert W[8:40][8:, 2] == W[16:40, 2]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: W.reshape(48, 8), ValueError, "6 neighbours cannot be cut into groups of 8"),
        (lambda: W.reshape(5, 7), ValueError, "cannot have the shape"),
        (lambda: W.permute(0, 0), ValueError, "no order of the dimensions"),
        (lambda: W[::-1], IndexError, "not at regular steps"),
        (lambda: W.reshape(384)[3:11], IndexError, "reshape it first"),
        (lambda: W[64], IndexError, "out of range"),
        (lambda: W[0, 0, 0], IndexError, "3 indices into"),
        (lambda: Joined((W, W[0]), 0), ValueError, "cannot be joined"),
        (lambda: Joined((W, W[:, 1:]), 0), ValueError, "cannot be joined"),
    ],
)
def test_what_is_not_regular_is_refused(make: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("grid", "why"),
    [
        (Grid((0,), (Axis(0, 1, 9),)), "beyond the end"),
        (Grid((-1,), (Axis(0, 1, 2),)), "before the start"),
        (Grid((0,), (Axis(1, 1, 2),)), "no such dimension"),
        (Grid((0, 0), ()), "another number of dimensions"),
        (Grid((0,), (Axis(0, 2, 3), Axis(0, 1, 3))), "elements twice"),
        (Grid((0,), (Axis(0, 0, 3),)), "the same element three times"),
    ],
)
def test_grids_that_do_not_fit_a_tensor_are_told(grid: Grid, why: str) -> None:
    assert not grid.fits((8,)), why
