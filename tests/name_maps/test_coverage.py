"""Every element of a tensor in exactly one slice: counted however they interleave, and refused otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from shardsmith.name_maps.coverage import find_impossible, find_uncovered
from shardsmith.name_maps.slices import Slice
from shardsmith.tensors.tensors import TensorSpec

SPEC = TensorSpec("w", (12, 6), torch.float32)
W = Slice.whole(SPEC)
Z = Slice.whole(TensorSpec("w", (13, 6), torch.float32))


def problems(parts: Sequence[Slice]) -> list[str]:
    slices = {f"file.{i}": part for i, part in enumerate(parts)}
    return [*find_impossible(slices.items(), {"w": SPEC})] or [*find_uncovered(parts, {"w": SPEC})]


@pytest.mark.parametrize(
    "parts",
    [
        [W],
        [W[:5], W[5:]],
        [W[::3], W[1::3], W[2::3]],
        [W.reshape(3, 4, 6)[:, i] for i in range(4)],
        # three bars that are no cells of one grid
        [W[:, ::2], W[:6, 1::2], W[6:, 1::2]],
    ],
)
def test_slices_that_take_everything_once_pass(parts: Sequence[Slice]) -> None:
    assert problems(parts) == []


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "used by no target"),
        ([W[::2]], "36 of 72 elements are used by no target"),
        ([W[::2], W[2::2]], "used twice"),
        ([W, W], "used twice"),
        # as many elements as there are, but the corner twice and another not at all
        ([W[:, ::2], W[:6, 1::2], W[5:11, 1::2]], "used twice"),
        ([Z], "no slice of a tensor of shape"),
        ([Slice.whole(TensorSpec("v", (1,), torch.float32))], "v, which is not there"),
    ],
)
def test_slices_that_do_not_are_told(parts: Sequence[Slice], words: str) -> None:
    (problem,) = problems(parts)
    assert words in problem
