from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from shardsmith.errors import CheckpointError, IncompleteCheckpointError
from shardsmith.formats.safetensors_files.source import SafetensorsSource
from shardsmith.ground.maps import reading_by_maps
from shardsmith.tensors.tensors import Chunk, read_into, read_tensor
from tests.hostile_headers import HOSTILE
from tests.tensor_cases import partitions, raw_bytes, spec_of, tensors


@given(found=st.lists(tensors(), max_size=4), data=st.data())
def test_any_box_of_any_tensor_is_read_exactly(
    found: list[Tensor], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("source") / "x.safetensors"
    named = {f"layer.{i}": tensor for i, tensor in enumerate(found)}
    path.write_bytes(save(named))
    source = SafetensorsSource(path)
    assert source.specs == {name: spec_of(name, tensor) for name, tensor in named.items()}
    for name, tensor in named.items():
        whole = Chunk.whole(tuple(tensor.shape))
        for box in data.draw(partitions(whole.sizes)):
            out = torch.empty(box.sizes, dtype=tensor.dtype)
            assert raw_bytes(read_into(source, name, box, out)) == raw_bytes(tensor[box.within(whole)])


@pytest.mark.parametrize("mapped", [True, False])
def test_pieces_outlive_the_source(tmp_path: Path, mapped: bool) -> None:
    save_file({"a": torch.arange(10)}, tmp_path / "x.safetensors")
    with reading_by_maps(lambda: None) if mapped else contextlib.nullcontext():
        source = SafetensorsSource(tmp_path / "x.safetensors")
    ((_, first),) = source.pieces("a", Chunk((2,), (3,)))
    ((_, again),) = source.pieces("a", Chunk((2,), (3,)))
    source.close()
    assert (first.data_ptr() == again.data_ptr()) == mapped
    assert first.tolist() == [2, 3, 4]


def test_a_file_whose_data_is_not_aligned_is_read(tmp_path: Path) -> None:
    data = save({"a": torch.arange(5, dtype=torch.float64)})
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip(b" ")
    text += b" " * (1 - len(text) % 2)  # so that the data begins at an odd byte
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert read_tensor(SafetensorsSource(tmp_path / "x.safetensors"), "a").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("data", "error"), HOSTILE)
def test_hostile_files_are_refused_by_name(data: bytes, error: type[CheckpointError], tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(error, match=r"x\.safetensors"):
        SafetensorsSource(tmp_path / "x.safetensors")


def test_a_file_cut_off_anywhere_is_refused_with_both_sizes(tmp_path: Path) -> None:
    data = save({f"layer.{i}": torch.randn(100) for i in range(10)})
    path = tmp_path / "x.safetensors"
    for size in [*range(0, len(data), 512), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(IncompleteCheckpointError, match=rf"expected .*\d+.* found {size}\b"):
            SafetensorsSource(path)


def test_a_file_that_the_user_names_may_be_a_link(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "blob")
    (tmp_path / "x.safetensors").symlink_to("blob")
    assert list(SafetensorsSource(tmp_path / "x.safetensors").specs) == ["a"]
