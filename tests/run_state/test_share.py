"""Who writes what, of all that a state dict may hold, is what comes out if each thing is looked at by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardsmith.errors import RanksDisagreeError
from shardsmith.formats.dcp import rank_file
from shardsmith.formats.dcp.cuts import CutTensor
from shardsmith.formats.dcp.rank_file import RankFile, RankFileWritten
from shardsmith.manifest.metadata import FileRecord
from shardsmith.run_state.described import Description, RankHolds, describe
from shardsmith.run_state.held import Entry, items
from shardsmith.run_state.piece_numbers import PieceNumbers, add_digests
from shardsmith.run_state.share import Share, speakers_of
from shardsmith.run_state.weight_files import Placed
from shardsmith.run_state.whole_directory import OwnFile, WholeDirectory, to_receipt
from shardsmith.sharding.holding import pack_flags, pack_lists, unpack_flags, unpack_lists
from shardsmith.tensors.tensors import Chunk
from tests.box_indexes import content_of
from tests.sharding.meshes import boxes_on, meshes, one_after_the_other, ranks_of, sharded


@st.composite
def states(draw: st.DrawFn) -> list[list[Entry]]:
    """What each rank of some mesh holds: tensors, values, what is each rank's own, and keys that some ranks lack."""
    mesh = draw(meshes)
    held: list[list[Entry]] = [[] for _ in ranks_of(mesh)]
    ways = draw(st.lists(sharded(mesh), min_size=1, max_size=3))
    what = st.tuples(st.sampled_from(["tensor", "tensor", "value", "empty", "own", "gathered"]), st.integers(0, 2))
    for i, (kind, number) in enumerate(draw(st.lists(what, min_size=1, max_size=10))):
        (shape, placements), dtype = ways[number % len(ways)], (torch.float32, torch.bfloat16)[number % 2]
        absent = (
            draw(st.sets(st.integers(1, max(1, len(held) - 1)), max_size=2)) if kind in ("value", "empty") else set()
        )
        for rank, entries in enumerate(held):
            boxes = tuple(boxes_on(shape, mesh, placements, rank))
            if kind == "tensor":
                entries.append(Entry(f"m.t{i}", ("m", f"t{i}"), shape, dtype, boxes))
            elif kind == "value" and rank not in absent:
                entries.append(Entry(f"m.v{i}", ("m", f"v{i}"), None, None, ()))
            elif kind == "empty" and rank not in absent:
                entries.append(Entry(f"m.e{i}", ("m", f"e{i}"), (0, 3), dtype, (Chunk.whole((0, 3)),)))
            elif kind == "own":
                path = ("rng", f"rank-{rank}", f"t{i}")
                entries.append(Entry(".".join(path), path, (5,), dtype, (Chunk.whole((5,)),)))
                entries.append(Entry(".".join((*path, "n")), (*path, "n"), None, None, ()))
            elif kind == "gathered":  # what every rank has of each, under the names that others use for their own
                for other in range(len(held)):
                    path = ("rng", f"rank-{other}", f"g{i}")
                    entries.append(Entry(".".join(path), path, None, None, ()))
    return held


def settled(held: Sequence[list[Entry]], placed: Placed) -> list[Share]:
    """The share of each rank, agreed as ``SaveInProgress`` lets them."""
    shares = [Share(rank) for rank in range(len(held))]
    votes = [share.vote(entries, placed) for share, entries in zip(shares, held, strict=True)]
    speakers = speakers_of(votes)
    reports = [share.report(entries, speakers) for share, entries in zip(shares, held, strict=True)]
    answers = shares[0].settle(reports, [])
    for share, entries, answer in zip(shares, held, answers, strict=True):
        share.accept(entries, answer)
    return shares


def one_by_one(held: Sequence[list[Entry]]) -> list[list[tuple[int, int]]]:
    """What each rank is to write: tensors so that bytes are even, all else so that their number is."""
    tensors = {e.key: e for entries in held for e in entries if e.shape is not None and 0 not in e.shape}
    shapes = {key: entry.shape or () for key, entry in tensors.items()}
    sizes = {key: entry.dtype.itemsize for key, entry in tensors.items() if entry.dtype is not None}
    boxes = [[(e.key, box) for e in entries if e.key in tensors for box in e.boxes] for entries in held]
    dealt = one_after_the_other(boxes, shapes, sizes)
    holders: dict[str, list[int]] = {}
    for rank, entries in enumerate(held):
        for entry in entries:
            if entry.key not in tensors:
                holders.setdefault(entry.key, []).append(rank)
    count, writers = [0] * len(held), {}
    for key, ranks in holders.items():
        writers[key] = min(ranks, key=count.__getitem__)
        count[writers[key]] += 1
    return [
        [
            (i, position)
            for i, position in items(entries)
            if ((entries[i].key, entries[i].boxes[position]) in dealt[rank] if entries[i].key in tensors else False)
            or writers.get(entries[i].key) == rank
        ]
        for rank, entries in enumerate(held)
    ]


@given(states(), st.data())
def test_shares_are_those_of_looking_at_each_thing_alone(held: list[list[Entry]], data: st.DataObject) -> None:
    keys = sorted({entry.key for entries in held for entry in entries if entry.shape is not None})
    written = frozenset(data.draw(st.sets(st.sampled_from(keys)) if keys else st.just(set())))
    tied = frozenset(data.draw(st.sets(st.sampled_from(keys)) if keys else st.just(set()))) - written
    placed = Placed(written, tied)
    shares = settled(held, placed)
    expected = [
        OwnFile.of(rank, entries, mine, placed)
        for rank, (entries, mine) in enumerate(zip(held, one_by_one(held), strict=True))
    ]
    assert [share.own for share in shares] == expected
    assert [shares[0].whole.file(rank) for rank in range(len(held))] == [own.file for own in expected]
    specs = [*shares[0].whole.specs]
    assert [*dict.fromkeys(e.key for entries in held for e in entries if e.shape is not None)] == specs
    assert_placed_as_in_files(shares[0].whole, [own.file for own in expected])
    numbers = PieceNumbers([*shares[0].whole.specs.values()], placed)
    for rank, own in enumerate(expected):
        text, lists = describe(held[rank], rank)
        one = RankHolds(rank, Description(text), lists)
        assert one.entries() == held[rank]
        found = [*items(held[rank])]
        flags = pack_flags(np.array([item in one_by_one(held)[rank] for item in found], dtype=bool))
        assert [specs[number] for number in numbers.of(one, flags)] == [piece.key for piece in own.pieces]


def assert_placed_as_in_files(whole: WholeDirectory, files: Sequence[RankFile]) -> None:
    """The index says of each box where it is in the file of its rank, as that is written."""
    lengths = [640, 65, 1]
    record = FileRecord(size=1, xxh3_128="0" * 32)
    of_objects = [[lengths[i % 3] for i in range(len(file.objects))] for file in files]
    receipts = [to_receipt(RankFileWritten(record, [], one)) for one in of_objects]
    found, objects = whole._placed_boxes([receipt["object_lengths"] for receipt in receipts])
    expected, objects_expected = content_of(files, lengths)
    assert objects == objects_expected
    assert {key: told(tensor) for key, tensor in found.items()} == {key: told(one) for key, one in expected.items()}


def told(tensor: CutTensor) -> list[object]:
    cut, *where = tensor
    numbers = [column.tolist() for column in (cut.lengths, *where)]
    return [cut.dtype, cut.shape, [*cut.boxes], *numbers]


def test_boxes_of_several_archives_count_for_their_tensor_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_file, "MOST_BYTES", 32)
    held = [[Entry(f"t{i}", (f"t{i}",), (5, 4), torch.float32, (Chunk.whole((5, 4)),)) for i in range(3)]]
    share = settled(held, Placed(frozenset({"t1"})))[0]
    text, lists = describe(held[0], 0)
    numbers = PieceNumbers([*share.whole.specs.values()], Placed(frozenset({"t1"})))
    found = numbers.of(RankHolds(0, Description(text), lists), pack_flags(np.ones(3, dtype=bool)))
    assert [f"t{number}" for number in found] == [piece.key for piece in share.own.pieces]
    assert_placed_as_in_files(share.whole, [share.own.file])
    assert len(found) > 6


def test_what_a_rank_says_of_its_boxes_does_not_get_longer_with_more_tensors_that_are_sharded_alike() -> None:
    def said(tensors: int) -> int:
        entries = [
            Entry(f"t{i}.{way}", ("m", f"t{i}.{way}"), (8, 6), torch.float32, (box,))
            for i in range(tensors)
            for way, box in enumerate([Chunk((0, 0), (4, 6)), Chunk((0, 3), (8, 3))])
        ]
        return len(Share(1).report(entries, [0])[2])

    assert said(4) == said(4000)


@given(st.lists(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)), max_size=3), max_size=4))
def test_lists_of_boxes_come_back_as_they_were(numbers: list[list[tuple[int, int]]]) -> None:
    lists = [(), (Chunk((), ()),), tuple(Chunk(tuple(a for a, _ in n), tuple(b for _, b in n)) for n in numbers[:1])]
    assert unpack_lists(pack_lists(lists)) == lists


@given(st.lists(st.booleans()))
def test_flags_come_back_as_they_were(flags: list[bool]) -> None:
    assert unpack_flags(pack_flags(np.array(flags, dtype=bool)), len(flags)).tolist() == flags


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1)), max_size=6))
def test_digests_are_added_modulo_2_to_the_64_however_often_a_tensor_is_met(found: list[tuple[int, int]]) -> None:
    sums = np.zeros((4, 2), dtype=np.uint64)
    add_digests(
        sums,
        np.array([number for number, _ in found], dtype=np.int64),
        np.array([[one, one] for _, one in found], dtype=np.uint64).reshape(-1, 2),
    )
    expected = [sum(one for number, one in found if number == i) % 2**64 for i in range(4)]
    assert sums.tolist() == [[one, one] for one in expected]


def test_a_tensor_that_ranks_hold_in_two_shapes_is_refused_by_name() -> None:
    held = [[Entry("m.a", ("m", "a"), (2 + rank,), torch.float32, (Chunk.whole((2 + rank,)),))] for rank in range(2)]
    with pytest.raises(
        RanksDisagreeError, match=r"\n  m\.a: rank 0 \(\[2\], 'float32'\), rank 1 \(\[3\], 'float32'\)$"
    ):
        settled(held, Placed())
