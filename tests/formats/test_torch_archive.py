"""One tensor in a torch.save archive: the same as torch.load gives, read where it lies, and nothing else."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardsmith.errors import (
    CheckpointError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsafeCheckpointError,
)
from shardsmith.formats.torch_files.archive import read_archived_object
from shardsmith.formats.torch_files.archive import read_archived_tensor as stored_or_unpacked
from shardsmith.ground.file_tensor import FileTensor
from shardsmith.ground.mapped import MappedFile

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint64, torch.float8_e4m3fn),
]
LAYOUTS: dict[str, Tensor] = {
    "contiguous": torch.arange(24.0).view(2, 3, 4),
    "transposed": torch.arange(24.0).view(4, 6).t(),
    "permuted": torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
    "channels last": torch.arange(120.0).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "part of a storage": torch.arange(100.0)[40:60],
    "every third": torch.arange(100.0)[1::3],
    "expanded": torch.arange(3.0).expand(4, 3),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0),
    "empty with rows": torch.empty(5, 0, 3),
    "parameter": torch.nn.Parameter(torch.arange(5.0)),
    "one element": torch.arange(10.0)[9:],
}


def archive(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def mapped(tmp_path: Path, data: bytes, before: int = 0) -> tuple[MappedFile, int, int]:
    """A file that holds the archive behind some other bytes, and where it is."""
    path = tmp_path / "shard.distcp"
    path.write_bytes(b"?" * before + data + b"!" * 100)
    return MappedFile(path), before, len(data)


def repacked(data: bytes, *, compress: bool = False, **changes: bytes | None) -> bytes:
    """The archive with other contents for some members (None: without it)."""
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            content = changes.get(name.partition("/")[2].replace(".", "_").replace("/", "_"), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return out.getvalue()


def read_archived_tensor(*place: Any) -> Tensor:
    found = stored_or_unpacked(*place)
    return found.whole() if isinstance(found, FileTensor) else found


def same(found: Tensor, expected: Tensor) -> bool:
    kinds = (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    return kinds and torch.equal(found.to(torch.complex128), expected.to(torch.complex128))


@pytest.mark.parametrize("before", [0, 1, 7, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_of_any_layout_is_read_with_its_strides(tmp_path: Path, layout: str, before: int) -> None:
    file, offset, length = mapped(tmp_path, archive(LAYOUTS[layout]), before)
    found = stored_or_unpacked(file, offset, length)
    assert isinstance(found, FileTensor)
    assert same(found.whole(), LAYOUTS[layout].detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_torch_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    data = archive(torch.arange(12).to(dtype).view(3, 4).t())
    expected = torch.load(io.BytesIO(data), weights_only=True)
    assert same(read_archived_tensor(*mapped(tmp_path, data, before=3)), expected)


@pytest.mark.parametrize("options", [{"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}], ids=str)
def test_archives_of_other_settings_of_torch_are_read(tmp_path: Path, options: dict[str, Any]) -> None:
    found = read_archived_tensor(*mapped(tmp_path, archive(torch.arange(5), **options), before=5))
    assert same(found, torch.arange(5))


def test_an_archive_from_before_torch_wrote_the_byte_order_is_read_where_it_lies(tmp_path: Path) -> None:
    file, offset, length = mapped(tmp_path, repacked(archive(torch.arange(5)), byteorder=None))
    found = stored_or_unpacked(file, offset, length)
    assert isinstance(found, FileTensor)
    assert same(found.whole(), torch.arange(5))


def test_an_archive_of_the_other_byte_order_is_swapped_by_torch(tmp_path: Path) -> None:
    swapped = torch.arange(5, dtype=torch.int32).numpy().byteswap().tobytes()
    data = repacked(archive(torch.arange(5, dtype=torch.int32)), byteorder=b"big", data_0=swapped)
    assert read_archived_tensor(*mapped(tmp_path, data)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "value", [torch.arange(6.0).to_sparse(), torch.randn(3, dtype=torch.complex64).conj()], ids=["sparse", "conjugate"]
)
def test_special_tensors_are_left_to_torch(tmp_path: Path, value: Tensor) -> None:
    assert torch.equal(read_archived_tensor(*mapped(tmp_path, archive(value))).to_dense(), value.to_dense())


def test_numbers_of_a_zip_beyond_32_bits_are_read_from_its_zip64_records(tmp_path: Path) -> None:
    out = io.BytesIO()
    plain = archive(torch.arange(5))
    with zipfile.ZipFile(io.BytesIO(plain)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as member:
                member.write(old.read(name))
    assert same(read_archived_tensor(*mapped(tmp_path, _as_zip64(out.getvalue()))), torch.arange(5))


def _as_zip64(data: bytes) -> bytes:
    """Move count, size and start of the directory from the end record into a zip64 one."""
    import struct

    *_, count, size, start, _ = struct.unpack("<4s4H2IH", data[-22:])
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(data) - 22, 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:-22] + record + locator + end


def test_an_archive_of_something_else_is_corrupt(tmp_path: Path) -> None:
    for value in ({"a": torch.ones(2)}, 5, [torch.ones(2)], "text"):
        with pytest.raises(CorruptCheckpointError, match="where a tensor should be"):
            read_archived_tensor(*mapped(tmp_path, archive(value)))


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_an_archive_that_asks_for_code_is_refused(tmp_path: Path) -> None:
    attack = pickle.dumps(Canary(tmp_path / "canary"), 2)
    place = mapped(tmp_path, repacked(archive(torch.ones(2)), data_pkl=attack))
    for read in (read_archived_tensor, read_archived_object):
        with pytest.raises(UnsafeCheckpointError):
            read(*place)
    assert not (tmp_path / "canary").exists()


def test_an_object_of_any_type_is_read_only_on_request(tmp_path: Path) -> None:
    place = mapped(tmp_path, archive(Path("x")))
    with pytest.raises(UnsafeCheckpointError, match="PosixPath"):
        read_archived_object(*place)
    assert read_archived_object(*place, allow_pickle=True) == Path("x")


@pytest.mark.parametrize(
    ("old", "new"), [(b"K\x05\x85", b"K\x06\x85"), (b"K\x00K\x05", b"K\x01K\x05"), (b"K\x01\x85", b"K\x02\x85")]
)
def test_a_tensor_that_reaches_beyond_its_payload_is_corrupt(tmp_path: Path, old: bytes, new: bytes) -> None:
    data = archive(torch.arange(5))
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        recipe = opened.read("archive/data.pkl")
    assert old in recipe
    with pytest.raises(CorruptCheckpointError):
        read_archived_tensor(*mapped(tmp_path, repacked(data, data_pkl=recipe.replace(old, new))))


def test_a_payload_of_another_size_is_corrupt(tmp_path: Path) -> None:
    data = archive(torch.arange(5))
    for payload in (b"\0" * 39, b""):
        with pytest.raises(CorruptCheckpointError):
            read_archived_tensor(*mapped(tmp_path, repacked(data, data_0=payload)))


def test_an_archive_cut_off_anywhere_is_an_error(tmp_path: Path) -> None:
    data = archive(torch.arange(5))
    file, offset, length = mapped(tmp_path, data, before=9)
    for shorter in range(0, length, 7):
        with pytest.raises(CorruptCheckpointError):
            read_archived_tensor(file, offset, shorter)
    with pytest.raises(IncompleteCheckpointError):
        read_archived_tensor(file, offset, length + 10_000)


@settings(max_examples=500, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5))
def test_changed_bytes_never_cause_another_error(tmp_path: Path, changes: list[tuple[float, int]]) -> None:
    data = bytearray(archive(torch.arange(40.0).view(5, 8).t()))
    for where, value in changes:
        data[int(where * len(data))] = value
    try:
        found = read_archived_tensor(*mapped(tmp_path, bytes(data)))
    except CheckpointError:
        return
    assert found.numel() < 10_000
