from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardsmith.errors import UsageError
from shardsmith.formats.safetensors_files.plan import FilePlan, WeightsPlan, plan_files
from shardsmith.ground.sizes import parse_size
from shardsmith.tensors.tensors import TensorSpec

SIZES = st.lists(st.integers(0, 60), max_size=30)
LIMITS = st.integers(1, 200)


def specs_of(sizes: list[int]) -> list[TensorSpec]:
    return [TensorSpec(f"t{i}", (size,), torch.uint8) for i, size in enumerate(sizes)]


def sizes_of(file: FilePlan) -> list[int]:
    return [placement.spec.nbytes for placement in file.tensors.values()]


def fewest_files(sizes: list[int], limit: int) -> int:
    """By trying every number of cuts at every place."""
    for count in range(1, len(sizes)):
        for cuts in itertools.combinations(range(1, len(sizes)), count - 1):
            runs = [sizes[a:b] for a, b in itertools.pairwise((0, *cuts, len(sizes)))]
            if all(sum(run) <= limit or len(run) == 1 for run in runs):
                return count
    return max(1, len(sizes))


def plan(sizes: list[int], limit: int | None) -> WeightsPlan:
    return plan_files(specs_of(sizes), max_shard_bytes=limit)


@given(SIZES, LIMITS)
def test_no_file_is_over_the_limit_but_for_one_large_tensor(sizes: list[int], limit: int) -> None:
    for file in plan(sizes, limit).files:
        assert sum(sizes_of(file)) <= limit or len(file.tensors) == 1


@given(SIZES, LIMITS)
def test_files_take_neighbours_and_leave_nothing_out(sizes: list[int], limit: int) -> None:
    files = plan(sizes, limit).files
    numbers = [sorted(int(name.removeprefix("t")) for name in file.tensors) for file in files]
    assert [number for group in numbers for number in group] == list(range(len(sizes)))


@given(st.lists(st.integers(0, 60), max_size=7), LIMITS)
def test_there_are_as_few_files_as_possible(sizes: list[int], limit: int) -> None:
    assert len(plan(sizes, limit).files) == fewest_files(sizes, limit)


@given(st.integers(1, 300), st.integers(1, 50), LIMITS)
def test_equal_tensors_are_dealt_out_evenly(count: int, size: int, limit: int) -> None:
    counts = {len(file.tensors) for file in plan([size] * count, limit).files}
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.integers(0, 100), min_size=40, max_size=200), st.integers(1_000, 3_000))
def test_files_of_many_tensors_are_of_nearly_one_size(sizes: list[int], limit: int) -> None:
    loads = [sum(sizes_of(file)) for file in plan(sizes, limit).files]
    slack = limit - sum(loads) / len(loads)  # with none, the limit and not the balance says where to cut
    assert max(loads) - min(loads) <= 300 or slack < 200


def test_the_last_file_is_no_leftover() -> None:
    loads = [sum(sizes_of(file)) for file in plan([10] * 11, 100).files]
    assert sorted(loads) == [50, 60]


@given(SIZES, LIMITS)
def test_the_index_says_where_each_tensor_is(sizes: list[int], limit: int) -> None:
    found = plan(sizes, limit)
    if len(found.files) == 1:
        assert found.index is None
        return
    assert found.index is not None
    assert found.index["metadata"] == {"total_size": sum(sizes)}
    assert found.index["weight_map"] == {name: file.name for file in found.files for name in file.tensors}


@pytest.mark.parametrize("limit", [None, 10**9])
def test_what_fits_goes_into_one_file_without_an_index(limit: int | None) -> None:
    found = plan([5, 7], limit)
    assert [file.name for file in found.files] == ["model.safetensors"]
    assert found.index is None


def test_no_tensors_make_one_file_that_is_only_a_header() -> None:
    for limit in (None, 5):
        (file,) = plan([], limit).files
        assert file.size == len(file.header) == 40


def test_files_are_named_after_the_stem() -> None:
    names = [file.name for file in plan_files(specs_of([5, 5, 5]), "ema", max_shard_bytes=5).files]
    assert names == [f"ema-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_a_name_must_not_be_in_two_files() -> None:
    spec = TensorSpec("a", (8,), torch.uint8)
    with pytest.raises(UsageError, match="'a': there 2 times"):
        plan_files([spec, spec], max_shard_bytes=8)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_must_be_positive(limit: int) -> None:
    with pytest.raises(UsageError, match="max_shard_bytes"):
        plan([1], limit)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        (" 500 MB ", 5 * 10**8),
        ("1.5KB", 1500),
        ("2TB", 2 * 10**12),
        ("4GiB", 4 * 2**30),
        ("0.5MiB", 2**19),
        ("3T", 3 * 10**12),
        ("7B", 7),
        ("123", 123),
        ("0.1GB", 10**8),
    ],
)
def test_sizes_are_decimal_unless_they_say_otherwise(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.4B", "1e9", "5 XB", "5GBB", "1,5GB", "inf", "٣GB", "5\nGB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


def test_a_large_model_is_balanced_too() -> None:
    found = plan([1000 + i % 977 for i in range(20_000)], 300_000)
    loads = [sum(sizes_of(file)) for file in found.files]
    assert max(loads) <= 300_000
    assert max(loads) - min(loads) < 4_000
