"""Files read box by box: the right bytes, nothing but regular files, nothing beyond the end; mapped or not."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    IncompleteCheckpointError,
    UnsafeCheckpointError,
    UsageError,
)
from shardsmith.ground.file_tensor import FileTensor
from shardsmith.ground.mapped import MappedFile
from shardsmith.ground.maps import reading_by_maps

CONTENT = bytes(range(256)) * 4
DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex64, torch.complex128]


@pytest.fixture(autouse=True, params=["mapped", "read"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the files of a test are read."""
    with reading_by_maps(lambda: None) if request.param == "mapped" else contextlib.nullcontext():
        yield request.param


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize("offset", [0, 1, 3, 8, 13])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_view_holds_the_bytes_of_its_range_at_any_offset(path: Path, dtype: torch.dtype, offset: int) -> None:
    view = MappedFile(path).view(offset, 24, dtype)
    assert view.shape == (24,)
    expected = torch.frombuffer(bytearray(CONTENT[offset : offset + 24 * dtype.itemsize]), dtype=torch.uint8)
    assert torch.equal(view.clone().view(torch.uint8), expected)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.int64, torch.complex64, torch.complex128], ids=str
)
def test_a_view_at_an_odd_offset_can_be_cast_and_copied_with_strides(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(4096).to(dtype)
    (tmp_path / "odd").write_bytes(b"x" + values.view(torch.uint8).numpy().tobytes())
    view, expected = MappedFile(tmp_path / "odd").view(1, 4096, dtype).view(64, 64), values.view(64, 64)
    assert torch.equal(view.to(torch.complex128), expected.to(torch.complex128))
    assert torch.equal(view.t()[3:, 5:].contiguous(), expected.t()[3:, 5:].contiguous())
    assert torch.equal(view[3:, 5:].contiguous(), expected[3:, 5:].contiguous())


def test_a_view_copies_nothing_if_the_file_is_mapped(path: Path, way: str) -> None:
    file = MappedFile(path)
    one, other = file.view(8, 4, torch.uint8), file.view(12, 1, torch.float32)
    assert (one.data_ptr() + 4 == other.data_ptr()) == (way == "mapped") == file.is_mapped


@pytest.mark.parametrize("way", ["read"], indirect=True)
def test_what_was_cut_off_since_is_an_error_and_no_signal(path: Path) -> None:
    file = MappedFile(path)
    os.truncate(path, 100)
    assert file.bytes(0, 100) == CONTENT[:100]
    for read in (file.bytes, file.tensor, lambda begin, n: file.read_into(begin, memoryview(bytearray(n)))):
        with pytest.raises(IncompleteCheckpointError, match="ends at byte 100 and had 1024"):
            read(50, 100)


def test_a_range_is_read_into_memory_of_the_caller(path: Path) -> None:
    memory = bytearray(7)
    MappedFile(path).read_into(3, memoryview(memory))
    assert bytes(memory) == CONTENT[3:10]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.complex128], ids=str)
def test_boxes_of_a_tensor_in_a_file_are_those_of_the_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(2 * 3 * 5).to(dtype).view(2, 3, 5)
    (tmp_path / "x").write_bytes(b"123" + values.view(torch.uint8).numpy().tobytes())
    stored = FileTensor.contiguous(MappedFile(tmp_path / "x"), 3, values.shape, dtype)
    turned = FileTensor(stored.file, 3, (5, 2), (1, 15), dtype)
    assert torch.equal(stored.whole(), values)
    assert torch.equal(turned.whole(), values[:, 0].t())
    for box in itertools.product(*([slice(a, b) for a in range(n) for b in range(a, n + 1)] for n in values.shape)):
        assert torch.equal(stored[box], values[box])


def test_a_tensor_and_bytes_of_a_range_agree(path: Path) -> None:
    file = MappedFile(path)
    assert file.size == len(CONTENT)
    assert bytes(file.tensor(250, 10).tolist()) == file.bytes(250, 10) == CONTENT[250:260]


def test_views_outlive_the_file(path: Path) -> None:
    file = MappedFile(path)
    view = file.tensor(0, 256)
    file.close()
    file.close()
    path.unlink()
    assert view.tolist() == list(range(256))


def test_a_closed_file_says_so(path: Path) -> None:
    file = MappedFile(path)
    file.close()
    with pytest.raises(UsageError, match=r"file\.bin: was closed"):
        file.tensor(0, 1)


@pytest.mark.parametrize(("offset", "length"), [(0, 1025), (1024, 1), (-1, 4), (4, -1), (1 << 62, 1), (0, 1 << 62)])
def test_a_range_beyond_the_file_is_incomplete(path: Path, offset: int, length: int) -> None:
    file = MappedFile(path)
    for read in (file.bytes, file.tensor):
        with pytest.raises(IncompleteCheckpointError, match="the file ends at 1024"):
            read(offset, length)


def test_an_empty_file_has_an_empty_view(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    file = MappedFile(tmp_path / "empty")
    assert (file.size, file.bytes(0, 0), file.view(0, 0, torch.float32).shape) == (0, b"", (0,))
    with pytest.raises(IncompleteCheckpointError):
        file.tensor(0, 1)


def test_an_empty_view_at_the_end_is_allowed(path: Path) -> None:
    assert MappedFile(path).tensor(1024, 0).shape == (0,)


def test_a_link_is_followed_only_on_request(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(UnsafeCheckpointError, match="symbolic link"):
        MappedFile(link)
    assert MappedFile(link, follow_links=True).bytes(0, 4) == CONTENT[:4]


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UnsafeCheckpointError, match="not a regular file"):
        MappedFile(tmp_path / "fifo", follow_links=True)


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self", "."])
def test_devices_and_directories_are_refused(path: str) -> None:
    with pytest.raises(UnsafeCheckpointError):
        MappedFile(path, follow_links=True)


@pytest.mark.parametrize("name", ["absent", "file.bin/below"])
def test_a_file_that_is_not_there_is_not_found(path: Path, name: str) -> None:
    with pytest.raises(CheckpointNotFoundError):
        MappedFile(path.parent / name)


def test_names_that_no_file_can_have_are_errors_of_ours(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(CheckpointError):
            MappedFile(tmp_path / name)


def test_a_broken_link_is_not_found_when_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(CheckpointNotFoundError):
        MappedFile(tmp_path / "link", follow_links=True)


def test_no_descriptor_stays_open(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files = [MappedFile(path) for _ in range(20)]
    # mmap keeps one of its own for each map
    for file in files:
        file.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_torch_does_not_warn_about_read_only_buffers(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MappedFile(path).tensor(0, 4)
