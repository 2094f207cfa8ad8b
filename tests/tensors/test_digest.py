from __future__ import annotations

import itertools
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardsmith.tensors import digest
from shardsmith.tensors.digest import Digest, digest_box, digest_run, digest_tensor
from shardsmith.tensors.tensors import Chunk
from tests.tensor_cases import DTYPES, partitions, random_tensor, raw_bytes, tensors


def reference(tensor: Tensor) -> str:
    """The definition, word by word, in Python's own integers."""
    data = raw_bytes(tensor)
    data += bytes(-len(data) % 8)
    words = struct.unpack(f"<{len(data) // 4}I", data)
    total = sum(words) % 2**64
    weighted = sum(place * word for place, word in enumerate(words, start=1)) % 2**64
    return f"{total:016x}{weighted:016x}"


@given(tensors())
def test_a_whole_tensor_has_the_digest_of_the_definition(tensor: Tensor) -> None:
    assert str(digest_tensor(tensor)) == reference(tensor)


@given(st.data())
def test_the_boxes_of_any_partition_add_up_in_any_order(data: st.DataObject) -> None:
    tensor = data.draw(tensors(max_size=7))
    shape = tuple(tensor.shape)
    whole = Chunk.whole(shape)
    boxes = data.draw(partitions(shape))
    shares = [digest_box(tensor[box.within(whole)], box, shape) for box in boxes]
    assert str(sum(shares, Digest())) == reference(tensor)


@given(tensors(max_size=7), st.lists(st.integers(0, 7**4), max_size=5))
def test_runs_cut_anywhere_add_up(tensor: Tensor, cuts: list[int]) -> None:
    flat = tensor.reshape(-1)
    ends = sorted({0, flat.numel(), *(cut for cut in cuts if cut < flat.numel())})
    shares = [digest_run(flat[a:b], a) for a, b in itertools.pairwise(ends)]
    assert str(sum(shares, Digest())) == reference(tensor)


@given(tensors().filter(lambda tensor: tensor.dim() >= 2))
def test_strides_do_not_matter(tensor: Tensor) -> None:
    assert str(digest_tensor(tensor.transpose(0, -1))) == reference(tensor.transpose(0, -1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("cut", [1, 65_535, 65_536, 130_001])
def test_runs_longer_than_a_block_add_up(dtype: torch.dtype, cut: int) -> None:
    tensor = random_tensor((1_200_003 // dtype.itemsize,), dtype, seed=cut)
    assert str(digest_run(tensor[cut:], cut) + digest_run(tensor[:cut], 0)) == reference(tensor)


def test_a_look_at_each_block_covers_the_run_once_in_order() -> None:
    seen: list[tuple[int, int]] = []
    tensor = random_tensor((3_000_001,), torch.uint8, seed=0)
    digest_run(tensor[3:], 3, lambda begin, end: seen.append((begin, end)))
    assert [begin for begin, _ in seen] == [0, *(end for _, end in seen[:-1])]
    assert len(seen) > 2
    assert seen[-1][1] == len(tensor) - 3


@pytest.mark.parametrize("columns", [(0, 700), (1, 2), (3, 698), (697, 700)], ids=str)
def test_column_boxes_longer_than_a_block_add_up(columns: tuple[int, int]) -> None:
    tensor = random_tensor((1201, 700), torch.bfloat16, seed=1)
    ends = sorted({0, *columns, 700})
    boxes = [Chunk((0, a), (1201, b - a)) for a, b in itertools.pairwise(ends)]
    shares = [digest_box(tensor[:, b.offsets[1] : b.offsets[1] + b.sizes[1]], b, (1201, 700)) for b in boxes]
    assert str(sum(shares, Digest())) == reference(tensor)


def test_the_sums_wrap_around_at_64_bits() -> None:
    tensor = torch.full((300_000,), -1, dtype=torch.int64)
    assert 300_000 * 600_000 * (2**32 - 1) > 2**64
    assert str(digest_tensor(tensor)) == reference(tensor)


def test_a_device_sums_as_the_processor_does() -> None:
    tensor = random_tensor((70_001,), torch.float32, seed=4)
    data = tensor.view(torch.uint8)
    assert str(digest._digest_blocks(data, 0, digest._look_away)) == reference(
        tensor
    )  # how a device's memory is cut and padded
    words, bases = data[:280_000].view(torch.int64).view(-1, 25), torch.arange(1400) * 25
    assert digest._sum_on_device(words, bases) == digest_tensor(tensor[:70_000])


def test_a_lazily_conjugated_tensor_has_the_digest_of_its_values() -> None:
    tensor = random_tensor((3, 5), torch.complex64, seed=2).nan_to_num()
    assert digest_tensor(tensor.conj()) == digest_tensor(tensor.conj().resolve_conj())


def test_views_that_begin_at_any_byte_have_the_digest_of_a_copy() -> None:
    data = random_tensor((4100,), torch.uint8, seed=3)
    for begin in range(9):
        assert str(digest_run(data[begin:], 0)) == reference(data[begin:])


@given(st.integers(1, 3), st.data())
def test_every_change_and_every_exchange_of_words_is_found(changes: int, data: st.DataObject) -> None:
    words = torch.arange(64, dtype=torch.int32) * 7
    i, j = data.draw(st.lists(st.integers(0, 63), min_size=2, max_size=2, unique=True))
    exchanged = words.clone()
    exchanged[[i, j]] = words[[j, i]]
    changed = words.clone()
    changed[i] += changes
    assert len({digest_tensor(words), digest_tensor(exchanged), digest_tensor(changed)}) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_nothing_have_the_digest_zero(dtype: torch.dtype) -> None:
    assert digest_tensor(torch.zeros(24, dtype=torch.uint8).view(dtype)) == Digest()
    assert digest_tensor(torch.empty((3, 0), dtype=dtype)) == Digest()


@given(tensors())
def test_parse_is_the_inverse_of_str(tensor: Tensor) -> None:
    digest = digest_tensor(tensor)
    assert Digest.parse(str(digest)) == digest


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "g" * 32, "0x" + "0" * 30, " " * 32, "_" * 32, "٣" * 32])
def test_parse_refuses_what_is_no_digest(text: str) -> None:
    with pytest.raises(ValueError, match=r"digest|base 16"):
        Digest.parse(text)


@pytest.mark.parametrize("begin", range(4))
def test_rows_that_begin_at_any_byte_have_the_digest_of_a_copy(begin: int) -> None:
    flat = random_tensor((100,), torch.bfloat16, seed=3)
    box, values = Chunk((0, 0), (4, 4)), flat[begin : begin + 16].view(4, 4)
    assert digest_box(values, box, (4, 8)) == digest_box(values.clone(), box, (4, 8))


def test_one_element_of_a_turned_tensor_has_the_digest_of_its_copy() -> None:
    element = torch.randn(7, 5).t()[1:2, 3:4]
    box = Chunk((1, 3), (1, 1))
    assert digest_box(element, box, (5, 7)) == digest_box(element.clone(), box, (5, 7))
