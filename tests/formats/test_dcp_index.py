"""The index of a DCP directory is checked against itself and against the files before anything is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from shardsmith.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsafeCheckpointError,
    UnsupportedFormatError,
)
from shardsmith.formats.dcp.index import read_index
from shardsmith.tensors.tensors import Chunk, TensorSpec
from tests import dcp_directories

FILE = "__0_0.distcp"
STATE: dict[str, Any] = {
    "model": {"w": torch.arange(12.0).view(3, 4), "n": torch.tensor(5), "e": torch.empty(0, 3)},
    "lr": 0.1,
    "layers": [1, {"x": torch.ones(2, dtype=torch.bfloat16)}],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dcp_directories.save(STATE, tmp_path_factory.mktemp("saved") / "step-5")


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "step-5"))


def test_an_index_gives_tensors_objects_containers_and_files(saved: Path) -> None:
    index = read_index(saved)
    specs = [entry.spec for entry in index.tensors.values()]
    assert specs == [
        TensorSpec("model.w", (3, 4), torch.float32),
        TensorSpec("model.n", (), torch.int64),
        TensorSpec("model.e", (0, 3), torch.float32),
        TensorSpec("layers.1.x", (2,), torch.bfloat16),
    ]
    assert set(index.objects) == {"lr", "layers.0"}
    assert index.containers["layers.1.x"] == ("layers", 1, "x")
    assert index.files == {FILE: (saved / FILE).stat().st_size}


def test_a_chunk_says_where_its_archive_lies(saved: Path) -> None:
    (stored,) = read_index(saved).tensors["model.w"].chunks
    archive = (saved / stored.file).read_bytes()[stored.offset : stored.offset + stored.length]
    assert stored.chunk == Chunk((0, 0), (3, 4))
    assert archive.startswith(b"PK\3\4")
    assert STATE["model"]["w"].numpy().tobytes() in archive


def test_an_empty_tensor_has_no_chunks(saved: Path) -> None:
    assert read_index(saved).tensors["model.e"].chunks == ()


def test_a_key_without_a_recorded_place_is_flat(directory: Path) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.planner_data = None

    dcp_directories.edit_index(directory, edit)
    assert read_index(directory).containers["model.w"] == ("model.w",)


def tensor(metadata: Metadata, name: str = "model.w") -> TensorStorageMetadata:
    entry = metadata.state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def place(metadata: Metadata) -> _StorageInfo:
    """Where model.w lies."""
    found = metadata.storage_data[MetadataIndex("model.w", torch.Size((0, 0)))]
    assert isinstance(found, _StorageInfo)
    return found


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def test_empty_and_repeated_chunks_are_passed_over(directory: Path) -> None:
    def edit(metadata: Metadata) -> None:
        tensor(metadata).chunks += [chunk((3, 0), (0, 4)), chunk((0, 0), (0, 4)), chunk((0, 0), (3, 4))]

    dcp_directories.edit_index(directory, edit)
    assert len(read_index(directory).tensors["model.w"].chunks) == 1


def test_a_missing_chunk_is_incomplete(directory: Path) -> None:
    def edit(metadata: Metadata) -> None:
        tensor(metadata).chunks.clear()
        tensor(metadata, "layers.1.x").chunks.clear()

    dcp_directories.edit_index(directory, edit)
    with pytest.raises(IncompleteCheckpointError) as caught:
        read_index(directory)
    assert "'model.w': 12 of 12 elements are in no chunk" in str(caught.value)
    assert "'layers.1.x': 2 of 2" in str(caught.value)


def test_data_that_was_never_written_is_incomplete(directory: Path) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.storage_data.clear()

    dcp_directories.edit_index(directory, edit)
    with pytest.raises(IncompleteCheckpointError) as caught:
        read_index(directory)
    for name in ("tensor 'model.w'", "tensor 'model.n'", "tensor 'layers.1.x'", "object 'lr'", "object 'layers.0'"):
        assert f"{name}" in str(caught.value)


def test_a_deleted_shard_is_incomplete_and_names_all_that_was_in_it(directory: Path) -> None:
    (directory / FILE).unlink()
    with pytest.raises(IncompleteCheckpointError) as caught:
        read_index(directory)
    assert str(caught.value).count(f"{FILE} is missing") == 5


@pytest.mark.parametrize("keep", [0, 1, 1000, 2000, 4000, -1])
def test_a_shard_cut_off_anywhere_is_incomplete(directory: Path, keep: int) -> None:
    size = (directory / FILE).stat().st_size
    os.truncate(directory / FILE, keep % size)
    with pytest.raises(IncompleteCheckpointError, match=f"{FILE} ends at byte {keep % size}"):
        read_index(directory)


def test_an_index_of_no_bytes_is_incomplete(directory: Path) -> None:
    os.truncate(directory / ".metadata", 0)
    with pytest.raises(IncompleteCheckpointError, match="is empty"):
        read_index(directory)


def test_shards_without_an_index_are_an_unfinished_save(directory: Path) -> None:
    (directory / ".metadata").unlink()
    with pytest.raises(IncompleteCheckpointError, match="did not finish"):
        read_index(directory)


def test_a_directory_of_something_else_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointNotFoundError, match=r"no \.metadata"):
            read_index(path)


def grow(metadata: Metadata, shape: tuple[int, ...]) -> None:
    """Claim that model.w has another shape, in one chunk."""
    tensor(metadata).size = torch.Size(shape)
    tensor(metadata).chunks[:] = [chunk((0, 0), shape)]


CONTRADICTIONS: dict[str, Callable[[Metadata], object]] = {
    "overlap": lambda m: tensor(m).chunks.append(chunk((2, 0), (1, 4))),
    "outside of it": lambda m: tensor(m).chunks.append(chunk((2, 0), (2, 4))),
    "starts outside": lambda m: tensor(m).chunks.append(chunk((9, 0), (0, 4))),
    "too few dimensions": lambda m: tensor(m).chunks.append(chunk((0,), (3,))),
    "offsets and sizes differ": lambda m: tensor(m).chunks.append(chunk((0, 0), (3,))),
    "sum of end overflows": lambda m: tensor(m).chunks.append(chunk((2**63 - 1, 0), (2**63 - 1, 1))),
    "larger than its bytes": lambda m: grow(m, (3, 4000)),
    "an endless list": lambda m: m.planner_data.update({"lr": ("a", 2**40)}),
    "nowhere": lambda m: m.planner_data.update({"lr": ()}),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_an_index_that_contradicts_itself_is_corrupt(directory: Path, case: str) -> None:
    dcp_directories.edit_index(directory, CONTRADICTIONS[case])
    with pytest.raises(CorruptCheckpointError, match=r"\.metadata"):
        read_index(directory)


NAMES = [
    *("", ".", "..", "../other/__0_0.distcp", "/etc/passwd", "a/b", "a\\b", "..\\x", "C:\\x", "C:x", "a\0b", "a\nb"),
    *("\x1b[2J", "x" * 300, "/dev/zero", "./__0_0.distcp", "__0_0.distcp/", "~/x/y"),
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_file_name_that_is_not_plain_is_unsafe(directory: Path, name: str) -> None:
    dcp_directories.edit_index(directory, lambda metadata: setattr(place(metadata), "relative_path", name))
    with pytest.raises(UnsafeCheckpointError):
        read_index(directory)


def test_a_link_in_place_of_a_shard_is_followed_only_on_request(directory: Path) -> None:
    (directory / FILE).rename(directory.parent / "blob")
    (directory / FILE).symlink_to("../blob")
    with pytest.raises(UnsafeCheckpointError, match="regular file"):
        read_index(directory)
    assert read_index(directory, follow_links=True).files == {FILE: (directory.parent / "blob").stat().st_size}


@pytest.mark.parametrize("name", [FILE, ".metadata"])
def test_a_fifo_or_directory_in_place_of_a_file_is_unsafe(directory: Path, name: str) -> None:
    for make in (os.mkfifo, os.mkdir):
        shutil.rmtree(directory / name) if (directory / name).is_dir() else (directory / name).unlink()
        make(directory / name)
        with pytest.raises(UnsafeCheckpointError, match="regular file"):
            read_index(directory)


def test_a_linked_index_is_unsafe(directory: Path) -> None:
    (directory / ".metadata").rename(directory.parent / "blob")
    (directory / ".metadata").symlink_to("../blob")
    with pytest.raises(UnsafeCheckpointError, match="symbolic link"):
        read_index(directory)


def test_transformed_chunks_are_not_supported(directory: Path) -> None:
    dcp_directories.edit_index(directory, lambda metadata: setattr(place(metadata), "transform_descriptors", ["zstd"]))
    with pytest.raises(UnsupportedFormatError, match="zstd"):
        read_index(directory)


def test_an_empty_list_of_transforms_is_none(directory: Path) -> None:
    dcp_directories.edit_index(directory, lambda metadata: setattr(place(metadata), "transform_descriptors", []))
    assert "model.w" in read_index(directory).tensors


def test_a_huge_sparse_shard_costs_nothing(directory: Path) -> None:
    dcp_directories.edit_index(directory, lambda metadata: grow(metadata, (2**40, 2**22)))
    os.truncate(directory / FILE, 1 << 40)
    with pytest.raises(CorruptCheckpointError, match="cannot hold the chunk"):
        read_index(directory)


def test_thousands_of_chunks_are_checked_quickly(directory: Path) -> None:
    def edit(metadata: Metadata) -> None:
        tensor(metadata).size = torch.Size((100 * 100, 4))
        boxes = [((100 * i, j), (100, 1)) for i in range(100) for j in range(4)]
        tensor(metadata).chunks[:] = [chunk(*box) for box in boxes]
        for offsets, _ in boxes:
            metadata.storage_data[MetadataIndex("model.w", torch.Size(offsets))] = _StorageInfo(FILE, 0, 1600)

    dcp_directories.edit_index(directory, edit)
    assert len(read_index(directory).tensors["model.w"].chunks) == 400


def test_an_object_in_place_of_a_tensor_stays_an_object(directory: Path) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.state_dict_metadata["model.w"] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex("model.w")] = place(metadata)

    dcp_directories.edit_index(directory, edit)
    index = read_index(directory)
    assert "model.w" in index.objects
    assert "model.w" not in index.tensors


def test_a_remembered_index_is_checked_anew_as_soon_as_anything_has_changed(directory: Path) -> None:
    first = read_index(directory)
    assert read_index(directory) is first
    dcp_directories.edit_index(directory, lambda metadata: metadata.state_dict_metadata.pop("model.w"))
    assert "model.w" not in read_index(directory).tensors
    os.truncate(directory / FILE, 10)
    with pytest.raises(IncompleteCheckpointError, match="ends at byte 10"):
        read_index(directory)
