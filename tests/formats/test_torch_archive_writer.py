from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardsmith.formats.torch_files.archive import read_archived_tensor
from shardsmith.formats.torch_files.archive_writer import ALIGNMENT, archive_layout
from shardsmith.ground.file_tensor import FileTensor
from shardsmith.ground.mapped import MappedFile
from tests.tensor_cases import DTYPES, raw_bytes


def archived(tensor: Tensor) -> bytes:
    payload = raw_bytes(tensor)
    layout = archive_layout(tuple(tensor.shape), tensor.dtype)
    data = layout.head + payload + layout.tail(zlib.crc32(payload))
    assert len(data) == layout.length
    return data


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7), (2, 3, 4)], ids=str)
def test_torch_reads_it_as_its_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    size = torch.Size(shape).numel() * dtype.itemsize
    data = [i % 2 if dtype is torch.bool else i % 61 for i in range(size)]
    tensor = torch.tensor(data, dtype=torch.uint8).view(dtype).reshape(shape)
    found = torch.load(io.BytesIO(archived(tensor)), weights_only=True)
    assert (found.dtype, tuple(found.shape), found.is_contiguous()) == (dtype, shape, True)
    assert raw_bytes(found) == raw_bytes(tensor)


@given(shape=st.lists(st.integers(0, 6), max_size=4), before=st.integers(0, 3))
def test_our_reader_reads_it_where_it_lies(
    shape: list[int], before: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensor = torch.randn(shape)
    path = tmp_path_factory.mktemp("archive") / "file"
    path.write_bytes(bytes(before * ALIGNMENT) + archived(tensor))
    offset = before * ALIGNMENT
    found = read_archived_tensor(MappedFile(path), offset, path.stat().st_size - offset)
    assert isinstance(found, FileTensor)
    assert raw_bytes(found.whole()) == raw_bytes(tensor)
    assert tensor.numel() == 0 or found.begin % ALIGNMENT == 0


def test_it_is_a_zip_with_right_checksums(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(archived(torch.randn(100)))
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"archive/{name}" for name in ("data.pkl", "byteorder", "version", "data/0")]


def test_the_head_ends_where_the_payload_is_aligned() -> None:
    for length in range(1, 200):
        assert len(archive_layout((length,), torch.int8).head) % ALIGNMENT == 0
