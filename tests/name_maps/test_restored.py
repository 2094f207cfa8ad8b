"""From memory to files and back, through any name map: each way box by box, and byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from shardsmith.errors import MismatchError, UsageError
from shardsmith.formats.models import ModelSource, TranslatedModel
from shardsmith.formats.safetensors_files.source import SafetensorsSource
from shardsmith.name_maps.maps import Translation
from shardsmith.name_maps.restored import RestoredModel
from shardsmith.name_maps.slices import Slice
from shardsmith.tensors.tensors import Chunk, TensorSource, TensorSpec, read_into, read_tensor
from tests.slice_cases import Known, boxes, name_maps, shards

MEMORY = {"a": torch.arange(48.0).view(8, 6), "b": torch.arange(4.0), "tied": torch.arange(4.0)}
SPECS = {name: TensorSpec(name, tuple(value.shape), value.dtype) for name, value in MEMORY.items() if name != "tied"}


class ShardsInMemory:
    """A ``TensorSource`` whose tensors lie in shards."""

    path = Path("memory")

    def __init__(self, tensors: Mapping[str, Tensor], data: st.DataObject) -> None:
        self.specs = {name: TensorSpec(name, tuple(value.shape), value.dtype) for name, value in tensors.items()}
        self._shards = {
            name: [(box, value[box.within(Chunk.whole(tuple(value.shape)))].clone()) for box in cut]
            for name, value in tensors.items()
            for cut in [data.draw(shards(tuple(value.shape)))]
        }

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        for chunk, values in self._shards[name]:
            if (common := chunk.intersect(box)) is not None:
                yield common, values[common.within(chunk)]

    def close(self) -> None:
        pass


class Permuted:
    """Rows of ``a`` interleaved in memory and apart in files; the rest under another name."""

    def targets(self, specs: Mapping[str, TensorSpec]) -> dict[str, Slice]:
        found = {f"file.{name}": Slice.whole(spec) for name, spec in specs.items()}
        if "file.a" in found:
            found["file.a"] = found["file.a"].reshape(4, 2, 6).transpose(0, 1).reshape(8, 6)
        return found


def assert_boxes_are_those_of(tensors: Mapping[str, Tensor], source: TensorSource, data: st.DataObject) -> None:
    assert {name: spec.shape for name, spec in source.specs.items()} == {n: tuple(v.shape) for n, v in tensors.items()}
    for name, value in tensors.items():
        box = data.draw(boxes(tuple(value.shape)))
        found = read_into(source, name, box, torch.empty(box.sizes, dtype=value.dtype))
        assert torch.equal(found, value[box.within(Chunk.whole(tuple(value.shape)))])


@given(name_maps(), st.data())
def test_any_box_of_the_files_can_be_read_from_shards_of_the_model(known: Known, data: st.DataObject) -> None:
    model = ModelSource.whole(ShardsInMemory(known.memory, data))
    assert_boxes_are_those_of(known.files, TranslatedModel(model, known), data)


@given(name_maps(), st.data())
def test_any_box_of_the_model_can_be_read_from_its_files(known: Known, data: st.DataObject) -> None:
    files = ShardsInMemory(known.files, data)
    assert_boxes_are_those_of(known.memory, RestoredModel(files, known, known.specs), data)


@given(name_maps(), st.data())
def test_there_and_back_is_the_same(known: Known, data: st.DataObject) -> None:
    there = TranslatedModel(ModelSource.whole(ShardsInMemory(known.memory, data)), known)
    assert_boxes_are_those_of(known.memory, RestoredModel(there, known, known.specs), data)


@given(name_maps(), st.data())
def test_a_map_that_loses_or_repeats_something_is_refused(known: Known, data: st.DataObject) -> None:
    model = ModelSource.whole(ShardsInMemory(known.memory, data))
    name = data.draw(st.sampled_from(sorted(known.slices)))
    target = known.slices[name]
    assume(all(part.grid.numel for part, _ in target.placed))
    lost = Known(known.memory, known.files, {n: t for n, t in known.slices.items() if n != name})
    twice = Known(known.memory, known.files, {**known.slices, "again": target})
    for wrong in [lost, twice]:
        with pytest.raises(UsageError, match=target.sources[0]):
            TranslatedModel(model, wrong)


@given(name_maps(), st.data())
def test_shards_of_the_model_fall_into_parts_of_the_files(known: Known, data: st.DataObject) -> None:
    translation = Translation(known, known.specs)
    made = {name: torch.full(shape, -1, dtype=torch.int32) for name, shape in translation.shapes.items()}
    for source, values in known.memory.items():
        whole = Chunk.whole(tuple(values.shape))
        for box in data.draw(shards(whole.sizes)):
            for name, part, found in translation.to_targets(source, box, values[box.within(whole)].clone()):
                place = part.within(Chunk.whole(translation.shapes[name]))
                assert bool((made[name][place] == -1).all())
                made[name][place] = found
    assert all(torch.equal(made[name].reshape(value.shape), value) for name, value in known.files.items())


class WithoutCounts(Permuted):
    """Has no place for ``counts`` in the files."""

    def targets(self, specs: Mapping[str, TensorSpec]) -> dict[str, Slice]:
        return {name: part for name, part in super().targets(specs).items() if name != "file.counts"}

    def leaves_out(self, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
        return {name: "it is only counted" for name in specs if name == "counts"}


class Loses(Permuted):
    """Has no place for ``counts`` either, and does not say so."""

    def targets(self, specs: Mapping[str, TensorSpec]) -> dict[str, Slice]:
        return WithoutCounts().targets(specs)


def restored(directory: Path, files: Mapping[str, Tensor]) -> RestoredModel:
    save_file({name: value.clone() for name, value in files.items()}, directory / "model.safetensors")
    return RestoredModel(SafetensorsSource(directory / "model.safetensors"), Permuted(), SPECS, aliases={"tied": "b"})


@pytest.mark.parametrize("there", ["file.b", "file.tied"])
def test_of_tied_tensors_the_files_need_only_one(tmp_path: Path, there: str) -> None:
    rows = MEMORY["a"].view(4, 2, 6).transpose(0, 1).reshape(8, 6)
    model = restored(tmp_path, {"file.a": rows, there: MEMORY["b"], "file.c": torch.ones(1)})
    assert list(model.specs) == ["a", "b"]
    assert model.unused == ("file.c",)
    assert all(torch.equal(read_tensor(model, name), MEMORY[name]) for name in model.specs)
    assert torch.equal(read_into(model, "tied", Chunk((1,), (2,)), torch.empty(2)), MEMORY["tied"][1:3])


def test_files_that_hold_a_tied_tensor_twice_say_so(tmp_path: Path) -> None:
    model = restored(tmp_path, {"file.a": MEMORY["a"], "file.b": MEMORY["b"], "file.tied": MEMORY["tied"] + 1})
    assert model.twice == {"file.tied": "file.b"}
    assert model.unused == ()


def test_files_that_do_not_fit_are_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        restored(tmp_path, {"file.a": torch.ones(6, 8), "other": torch.ones(1)})
    assert caught.value.problems == ["file.a: (6, 8) in the files, (8, 6) in the model", "file.b: not in the files"]
    assert "other" in str(caught.value)


def test_what_a_map_leaves_out_on_purpose_is_said_both_ways(tmp_path: Path) -> None:
    save_file({"a": MEMORY["a"], "counts": torch.ones(3)}, tmp_path / "model.safetensors")
    memory = ModelSource.whole(SafetensorsSource(tmp_path / "model.safetensors"))
    files = TranslatedModel(memory, WithoutCounts())
    assert list(files.specs) == ["file.a"]
    assert files.left_out == {"counts": "it is only counted"}
    back = RestoredModel(files, WithoutCounts(), memory.specs)
    assert list(back.specs) == ["a"]
    assert back.absent == files.left_out
    given = RestoredModel(files, WithoutCounts(), memory.specs, made={"counts": torch.zeros(3)})
    assert torch.equal(read_into(given, "counts", Chunk((1,), (2,)), torch.ones(2)), torch.zeros(2))
    assert list(given.specs) == ["a", "counts"]
    with pytest.raises(UsageError, match="counts: used by no target"):
        TranslatedModel(memory, Loses())
