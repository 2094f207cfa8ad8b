from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardsmith.ground.mapped import MappedFile
from shardsmith.ground.memory import map_pages, same_bits
from shardsmith.tensors.checksums import crc32


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64, torch.complex64, torch.complex128],
)
def test_one_bit_makes_a_difference_wherever_it_is(dtype: torch.dtype, contiguous: bool) -> None:
    bits = torch.arange(64 * 8, dtype=torch.int64).view(torch.uint8).reshape(64, 64) % 2
    one = bits.view(dtype) if contiguous else bits.view(dtype).t()
    for place in ((0, 0), (63, 63), (20, 9)):
        other = bits.clone()
        assert same_bits(one, like(one, other, dtype))
        other[place] ^= 1
        assert not same_bits(one, like(one, other, dtype))


def like(one: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.view(dtype) if one.is_contiguous() else bits.view(dtype).t().contiguous()


def test_bits_are_compared_and_not_numbers() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.empty(0), torch.empty(0))


@pytest.mark.parametrize(("begin", "length"), [(0, 100_000), (1, 99_999), (4095, 2), (99_999, 1), (5, 0)])
def test_any_part_of_a_file_can_be_mapped_at_once_and_reads_as_before(begin: int, length: int, tmp_path: Path) -> None:
    data = bytes(i % 251 for i in range(100_000))
    (tmp_path / "file").write_bytes(data)
    view = MappedFile(tmp_path / "file").tensor(begin, length)
    map_pages(view)
    assert bytes(view.tolist()) == data[begin : begin + length]


@given(st.binary(max_size=300), st.integers(0, 300))
def test_the_checksum_is_that_of_zip_and_goes_on_where_it_was(data: bytes, cut: int) -> None:
    assert crc32(memoryview(data)[cut:], crc32(memoryview(data)[:cut], 0)) == zlib.crc32(data)
