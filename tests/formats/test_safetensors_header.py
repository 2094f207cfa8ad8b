from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from shardsmith.errors import (
    CheckpointError,
    IncompleteCheckpointError,
    UsageError,
)
from shardsmith.formats.safetensors_files.header import Header, build_header, place_tensors, read_header
from shardsmith.tensors.tensors import TensorSpec
from tests.hostile_headers import HOSTILE, framed
from tests.tensor_cases import DTYPES, random_tensor, spec_of, tensors

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12).filter(
    "__metadata__".__ne__
)
FLOAT = TensorSpec("a", (1,), torch.float32)


def read(data: bytes) -> Header:
    return read_header("x.safetensors", len(data), lambda offset, length: data[offset : offset + length])


@given(st.dictionaries(NAMES, tensors(), max_size=6))
def test_the_header_is_the_one_of_the_library(named: dict[str, Tensor]) -> None:
    header = build_header(spec_of(name, tensor) for name, tensor in named.items())
    assert save(named, {"format": "pt"})[: len(header)] == header
    assert len(header) % 8 == 0


@given(st.dictionaries(NAMES, tensors(), max_size=6))
def test_what_the_library_writes_is_read_back(named: dict[str, Tensor]) -> None:
    header = read(save(named, {"format": "pt"}))
    specs = {name: spec_of(name, tensor) for name, tensor in named.items()}
    assert {name: placement.spec for name, placement in header.tensors.items()} == specs
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == list(place_tensors(specs.values(), data_begin=0))


@given(st.dictionaries(NAMES, NAMES, max_size=1))  # of more keys, the library's order is random
def test_any_metadata_is_written_as_the_library_does(metadata: dict[str, str]) -> None:
    tensor = torch.zeros(1)
    header = build_header([FLOAT], metadata)
    assert header + bytes(4) == save({"a": tensor}, metadata)
    assert read(header + bytes(4)).metadata == metadata


def test_every_dtype_of_the_library_is_known() -> None:
    named = {str(dtype): random_tensor((4,), dtype, seed=1) for dtype in DTYPES}
    placements = read(save(named)).tensors
    assert {placement.spec.dtype for placement in placements.values()} == set(DTYPES)
    assert all(placement.begin % placement.spec.dtype.itemsize == 0 for placement in placements.values())


@pytest.mark.parametrize(
    "specs",
    [
        [FLOAT, TensorSpec("a", (2,), torch.int8)],
        [TensorSpec("__metadata__", (1,), torch.float32)],
        [TensorSpec("a\0b", (1,), torch.float32)],
        [TensorSpec("\ud800", (1,), torch.float32)],
        [TensorSpec("a", (1,), torch.complex128)],
        [TensorSpec("a", (1,), torch.quint8)],
        [TensorSpec("a", (), torch.float4_e2m1fn_x2)],
    ],
    ids=["twice", "reserved", "nul", "surrogate", "complex128", "quantized", "0-dim pair of F4"],
)
def test_what_a_file_cannot_hold_is_refused_before_writing(specs: list[TensorSpec]) -> None:
    with pytest.raises(UsageError, match="cannot hold"):
        build_header(specs)


def test_a_header_that_readers_would_refuse_is_not_built() -> None:
    with pytest.raises(UsageError, match="smaller shards"):
        build_header([TensorSpec("a" * 100_000_000, (1,), torch.float32)])


@pytest.mark.parametrize(("data", "error"), HOSTILE)
def test_hostile_headers_are_refused_in_a_few_words(data: bytes, error: type[CheckpointError]) -> None:
    with pytest.raises(error) as caught:
        read(data)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "", "a" * 10_000, "é😀", "\u2028"])
def test_names_are_names_of_tensors_not_of_files(name: str) -> None:
    data = save({name: torch.zeros(2)})
    assert list(read(data).tensors) == [name]


def test_a_truncated_payload_is_reported_with_both_sizes() -> None:
    data = save({"a": torch.zeros(100)})
    with pytest.raises(IncompleteCheckpointError, match=f"expected {len(data)} bytes, found {len(data) - 7}"):
        read(data[:-7])


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice([b" ", b"0", b"1", b"-", b",", b"[", b"]", b"{", b"}", b'"', b"\\u0000", b"null", b"1e1"])


def delete(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randint(1, 8)]


def repeat(data: bytearray, rng: random.Random) -> None:
    begin, at = rng.randrange(len(data)), rng.randrange(len(data))
    data[at:at] = data[begin : begin + rng.randint(1, 80)]


def transplant(data: bytearray, rng: random.Random) -> None:
    old, new = rng.sample(
        [b"F32", b"I64", b"U8", b"F4", b"BOOL", b"[0", b"[1", b"8]", b"shape", b"dtype", b"a", b"b"], 2
    )
    data[:] = data.replace(old, new, rng.randint(1, 2))


def mutants(count: int) -> list[bytes]:
    rng = random.Random(20_240_607)
    named = {name: random_tensor((2, 4), dtype, seed=1) for name, dtype in zip("abcd", DTYPES[::5], strict=True)}
    original = save(named | {"e": torch.zeros(0, 3), "f": torch.zeros(())}, {"format": "pt"})
    end = 8 + int.from_bytes(original[:8], "little")
    found = []
    for _ in range(count):
        text = bytearray(original[8:end])
        for _ in range(rng.randint(1, 3)):
            rng.choice([flip, insert, delete, repeat, transplant])(text, rng)
        length = len(text) if rng.random() < 0.95 else rng.randrange(2 * len(text))
        found.append(length.to_bytes(8, "little") + bytes(text) + original[end:])
    return found


def accepted(reader: Callable[[bytes], object], data: bytes) -> bool:
    try:
        reader(data)
    except (CheckpointError, safetensors.SafetensorError):
        return False
    return True


def test_whatever_the_library_refuses_is_refused() -> None:
    verdicts = [(accepted(safetensors.deserialize, data), accepted(read, data)) for data in mutants(50_000)]
    assert (False, True) not in verdicts
    assert verdicts.count((True, True)) > 1_000, "the mutations must leave some files valid, or nothing is compared"


def test_what_both_accept_is_read_alike() -> None:
    for data in mutants(5_000):
        if accepted(read, data):
            expected = {name: bytes(info["data"]) for name, info in safetensors.deserialize(data)}
            tensors = read(data).tensors
            assert {name: data[tensor.begin : tensor.end] for name, tensor in tensors.items()} == expected


@given(st.binary(max_size=200))
def test_noise_is_refused_with_a_typed_error(noise: bytes) -> None:
    assert not accepted(read, framed(noise) if len(noise) % 2 else noise) or noise.rstrip(b" ").endswith(b"}")
