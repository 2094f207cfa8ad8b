"""Boxes that cut up a tensor, against a count of every element."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardsmith.sharding.boxes import BoxFinder, IrregularBoxesError, find_overlap
from shardsmith.tensors.tensors import Chunk

SHAPE = (6, 5, 4)


@st.composite
def boxes(draw: st.DrawFn) -> Chunk:
    starts = [draw(st.integers(0, n - 1)) for n in SHAPE]
    return Chunk(tuple(starts), tuple(draw(st.integers(1, n - a)) for n, a in zip(SHAPE, starts, strict=True)))


def hits(some: list[Chunk]) -> torch.Tensor:
    """How many of the boxes each element lies in."""
    count = torch.zeros(SHAPE, dtype=torch.int64)
    for box in some:
        count[box.within(Chunk.whole(SHAPE))] += 1
    return count


@given(st.lists(boxes(), max_size=6, unique=True))
def test_an_overlap_is_found_exactly_when_an_element_is_hit_twice(some: list[Chunk]) -> None:
    found = find_overlap(some)
    assert (found is not None) == bool((hits(some) > 1).any())
    if found:
        assert found[0].intersect(found[1]) is not None


@given(st.lists(boxes(), max_size=6), boxes())
def test_the_finder_finds_what_looking_at_all_boxes_finds(some: list[Chunk], box: Chunk) -> None:
    found = sorted(BoxFinder(some).meeting(box), key=lambda pair: pair[0])
    assert found == [(i, part) for i, other in enumerate(some) if (part := other.intersect(box))]


def test_the_box_of_a_scalar_meets_itself() -> None:
    assert list(BoxFinder([Chunk((), ())]).meeting(Chunk((), ()))) == [(0, Chunk((), ()))]
    assert find_overlap([Chunk((), ())]) is None


def grid(rows: int, columns: int) -> list[Chunk]:
    return [Chunk((3 * i, 5 * j), (3, 5)) for i, j in itertools.product(range(rows), range(columns))]


def test_thousands_of_boxes_are_checked_and_found_in_no_time() -> None:
    some = grid(200, 100)
    began = time.process_time()
    assert find_overlap(some) is None
    finder = BoxFinder(some)
    assert all(len(list(finder.meeting(box))) == 1 for box in some[::50])
    assert time.process_time() - began < 15  # it takes less than one; each with each, minutes


def test_one_overlap_among_thousands_is_found() -> None:
    some = [*grid(50, 40), Chunk((10, 10), (1, 1))]
    assert find_overlap(some) is not None


def test_boxes_without_any_order_are_given_up() -> None:
    # all overlap along every dimension by itself, none overlaps another
    stairs = [Chunk((i, 0, 999 - i), (1_000 - i, 1, 1)) for i in range(1_000)]
    with pytest.raises(IrregularBoxesError, match="1000 boxes"):
        find_overlap(stairs)
