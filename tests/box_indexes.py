"""The index that loads read, compared with the one of torch beside it; and what both are made of."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shardsmith.formats.dcp.box_grid import finder_of
from shardsmith.formats.dcp.box_index import BoxIndex, load_index
from shardsmith.formats.dcp.cuts import Cuts, CutTensor, cut_tensors
from shardsmith.formats.dcp.index import DcpIndex, StoredChunk, read_index
from shardsmith.formats.dcp.rank_file import RankFile
from shardsmith.formats.dcp.shard_files import Place, PlannedChunk
from shardsmith.sharding.boxes import BoxFinder
from shardsmith.tensors.tensors import Chunk, Shape, TensorSpec


class Forgets(dict[Any, Any]):
    """Has nothing that was put into it, but once."""

    def __contains__(self, key: object) -> bool:
        return False


def forgetful(cuts: Cuts) -> None:
    """Stands for ``Cuts.__init__``: each tensor is looked at, as if none were cut like it."""
    cuts._boxes, cuts._numbers, cuts._known = [], {}, Forgets()


def content_of(
    files: Sequence[RankFile], object_lengths: Sequence[int]
) -> tuple[dict[str, CutTensor], dict[str, Place]]:
    """Tensors and objects of files, as an index has them; objects have these lengths in turn."""
    chunks, places = list[PlannedChunk](), list[Place]()
    objects, specs = dict[str, Place](), dict[str, TensorSpec]()
    for file in files:
        lengths = [object_lengths[i % len(object_lengths)] for i in range(len(file.objects))]
        found = [*file.places(lengths)]
        places += found[: len(file.pieces)]
        objects |= dict(zip(file.objects, found[len(file.pieces) :], strict=True))
        chunks += [PlannedChunk(p.key, 0, p.box, 0) for p in file.pieces]
        specs |= {p.key: TensorSpec(p.key, p.shape, p.dtype) for p in file.pieces}
    return cut_tensors(specs, chunks, dict(enumerate(places)), [file.name for file in files]), objects


def assert_same_boxes(directory: Path) -> None:
    """``.boxes`` says what ``.metadata`` says, entry by entry and for any box that is asked for."""
    expected, found = read_index(directory), load_index(directory)
    with contextlib.closing(found):
        assert isinstance(found, BoxIndex)
        assert_same_entries(found, expected)


def assert_same_entries(found: DcpIndex, expected: DcpIndex) -> None:
    """All that is asked of an index is answered alike."""
    assert set(found.tensors) == set(expected.tensors)
    assert dict(found.objects) == dict(expected.objects)
    assert dict(found.containers) == dict(expected.containers)
    assert dict(found.files).items() >= dict(expected.files).items()
    assert found.top_keys() >= expected.top_keys()
    assert "absent" not in found.tensors
    for top in {path[0] for path in expected.containers.values()}:
        assert dict(found.below(str(top))) == dict(expected.below(str(top)))
    for key, entry in expected.tensors.items():
        one = found.tensors[key]
        assert one.spec == entry.spec
        assert sorted(map(repr, one.chunks)) == sorted(map(repr, entry.chunks)), key
        finder = BoxFinder([stored.chunk for stored in entry.chunks])
        for box in boxes_within(entry.spec.shape):
            meeting = [*finder_of(one.chunks).meeting(box)]
            assert told(meeting, one.chunks) == told([*finder.meeting(box)], entry.chunks), (key, box)


def told(meeting: Sequence[tuple[int, Chunk]], chunks: Sequence[StoredChunk]) -> list[str]:
    return sorted(f"{part} of {chunks[i]}" for i, part in meeting)


def boxes_within(shape: Shape) -> Iterator[Chunk]:
    """The whole tensor, and some boxes at random."""
    if 0 not in shape:
        yield Chunk.whole(shape)
        chance = random.Random(repr(shape))
        for _ in range(4):
            ends = [sorted(chance.sample(range(n + 1), 2)) for n in shape]
            yield Chunk(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
