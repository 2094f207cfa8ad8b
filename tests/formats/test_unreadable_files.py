"""A file that is made to cost more than it is: an error, in bounds."""

from __future__ import annotations

import resource
import zipfile
from pathlib import Path

import pytest

from shardsmith.errors import CorruptCheckpointError, UnsupportedFormatError
from shardsmith.formats.dcp.index_pickle import load_dcp_index
from shardsmith.formats.torch_files.files import read_torch_file


def colliding(count: int) -> bytes:
    """A dict whose keys all have the hash 0."""
    prime = (1 << 61) - 1
    keys = (b"\x8a\x0b" + ((key + 1) * prime).to_bytes(11, "little") + b"N" for key in range(count))
    return b"\x80\x04}(" + b"".join(keys) + b"u."


BOMBS = {
    "keys of one hash": colliding(100_000),
    "dicts": b"\x80\x04(" + b"}" * (4 << 20) + b"t.",
    "lists": b"\x80\x04(" + b"]" * (4 << 20) + b"t.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_an_index_that_costs_more_than_it_is_is_refused_in_bounds(tmp_path: Path, bomb: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(CorruptCheckpointError):
        load_dcp_index(BOMBS[bomb], tmp_path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 5.0, "it takes minutes without the bound"
    assert after.ru_maxrss - before.ru_maxrss < 256 << 10


def test_a_compressed_torch_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * (32 << 20))
    with pytest.raises(UnsupportedFormatError, match="compressed"):
        read_torch_file(path)
