"""Which dtype a tensor gets by pattern, and what is refused."""

from __future__ import annotations

import pytest
import torch

from shardsmith.errors import UsageError
from shardsmith.tensors.dtypes import cast_specs, parse_dtypes
from shardsmith.tensors.tensors import TensorSpec

SPECS = [
    TensorSpec("model.norm.weight", (4,), torch.float32),
    TensorSpec("model.proj.weight", (4, 4), torch.float32),
    TensorSpec("model.half", (2,), torch.float16),
    TensorSpec("model.steps", (), torch.int64),
]


def dtypes_of(choice: object, *exceptions: str) -> list[torch.dtype]:
    return [spec.dtype for spec in cast_specs(SPECS, parse_dtypes(choice, exceptions))]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("choice", "exceptions", "expected"),
    [
        ("bfloat16", [], [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int64]),
        ("original", [], [torch.float32, torch.float32, torch.float16, torch.int64]),
        ({"*norm*": "float32", "*": "bfloat16"}, [], [torch.float32, torch.bfloat16, torch.bfloat16, torch.int64]),
        ({"*.weight": "float16"}, [], [torch.float16, torch.float16, torch.float16, torch.int64]),
        ({"*.half": "original", "*": "float64"}, [], [torch.float64, torch.float64, torch.float16, torch.int64]),
        ("bfloat16", ["*norm*=float32", "*o*=float64"], [torch.float32, torch.float64, torch.float64, torch.int64]),
    ],
    ids=str,
)
def test_the_first_pattern_that_matches_decides_and_integers_stay(
    choice: object, exceptions: list[str], expected: list[torch.dtype]
) -> None:
    assert dtypes_of(choice, *exceptions) == expected


def test_a_pattern_that_decides_about_nothing_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"'\*nrom\*', '\*proj\*' decides about no tensor"):
        dtypes_of({"*nrom*": "float32", "*weight": "float32", "*proj*": "float16", "*": "bfloat16"})


@pytest.mark.parametrize("name", ["int8", "bf61", "nn", 16, torch.int8])
def test_what_is_no_floating_point_dtype_is_refused(name: object) -> None:
    for choice in (name, {"*": name}):
        with pytest.raises(UsageError, match=f'dtype "{name}"'):
            parse_dtypes(choice)  # type: ignore[arg-type]


def test_an_exception_without_a_dtype_is_refused() -> None:
    with pytest.raises(UsageError, match="write PATTERN=DTYPE"):
        parse_dtypes("bfloat16", ["norm"])
