from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardsmith.formats.dcp.shard_files import PlannedChunk, divide
from shardsmith.tensors.tensors import Chunk


@given(sizes=st.lists(st.integers(0, 100)), parts=st.integers(1, 9), start=st.integers(0, 5))
def test_parts_are_consecutive_complete_and_about_equal(sizes: list[int], parts: int, start: int) -> None:
    chunks = [PlannedChunk("x", 0, Chunk((0,), (n,)), n) for n in [*[7] * start, *sizes]]
    cuts = divide(chunks, range(start, len(chunks)), parts)
    assert [i for cut in cuts for i in cut] == list(range(start, len(chunks)))
    assert len(cuts) == parts
    largest = max(sizes, default=0)
    assert all(sum(chunks[i].nbytes for i in cut) <= sum(sizes) / parts + largest for cut in cuts)
