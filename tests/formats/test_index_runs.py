"""Many boxes of an index are read at once, with the result of reading one instruction after the other."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardsmith.errors import CheckpointError
from shardsmith.formats.dcp import index_pickle
from shardsmith.formats.dcp.index_pickle import load_dcp_index
from shardsmith.formats.dcp.index_runs import _BOX, _STORED, IndexRuns
from shardsmith.formats.dcp.saved_index import SavedIndex
from shardsmith.formats.torch_files.pickle_machine import read_pickle
from shardsmith.tensors.tensors import Chunk

PATH = Path("step-5/.metadata")


def outcome(read: Any, data: bytes) -> SavedIndex | str:
    """What it returns, or what it raises."""
    try:
        found: SavedIndex = read(data, PATH)
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return found


def slowly(data: bytes, path: Path) -> SavedIndex:
    """Read one instruction after the other."""
    return index_pickle._IndexDecoder(path, len(data)).index(read_pickle(data, path, index_pickle._INDEX_NAMES))


def in_runs(data: bytes, path: Path) -> SavedIndex:
    """Read in runs alone: ``load_dcp_index`` reads again without them if that fails."""
    decoder = index_pickle._IndexDecoder(path, len(data))
    return decoder.index(read_pickle(data, path, index_pickle._INDEX_NAMES, runs=IndexRuns().by_name))


def index(names: dict[str, tuple[int, ...]], ranks: int, step: int, *, shares: bool, whole: bool) -> Metadata:
    """Return an index as torch makes it, of tensors whose rows are cut, and of one value that is no tensor.

    Args:
        names: Shapes of the boxes.
        ranks: How many boxes of each.
        step: Between two places in a file.
        shares: Whether places refer to the objects of boxes, as in a save by one process.
        whole: Whether fields of other versions of torch are there.
    """
    tensors: dict[str, Any] = {"step": BytesStorageMetadata()}
    places = {MetadataIndex("step"): _StorageInfo("__0_0.distcp", 0, 5)}
    files = [f"__{rank}_0.distcp" for rank in range(ranks)]
    for number, (name, shape) in enumerate(names.items()):
        boxes = []
        for rank in range(ranks):
            begin = torch.Size([shape[0] * rank, *[0] * (len(shape) - 1)] if shape else [])
            boxes.append(ChunkStorageMetadata(begin, torch.Size(shape)))
            own = (name, begin, files[rank]) if shares else copy.deepcopy((name.encode(), [*begin], files[rank]))
            key = own[0] if isinstance(own[0], str) else own[0].decode()
            info = _StorageInfo(own[2], step * number, step + 1)
            if whole:
                vars(info)["transform_descriptors"] = None
            places[MetadataIndex(key, torch.Size(own[1]) if not shares else begin, rank or None)] = info
        rows = torch.Size([shape[0] * ranks, *shape[1:]] if shape else [])
        tensors[name] = TensorStorageMetadata(TensorProperties(), rows, boxes)
    return Metadata(tensors, {name: (name,) for name in tensors}, places)


names = st.dictionaries(
    st.text(min_size=1, max_size=8) | st.text("ab.", min_size=250, max_size=260),
    st.lists(st.sampled_from([1, 3, 200, 70_000, 1 << 33]), max_size=4).map(tuple),
    max_size=5,
)
indexes = st.builds(
    index,
    names,
    st.integers(1, 4),
    st.sampled_from([1, 300, 1 << 31, 1 << 39, 1 << 60, 1 << 63]),
    shares=st.booleans(),
    whole=st.booleans(),
)


@settings(max_examples=150, deadline=20_000)
@given(indexes, st.integers(2, 5))
def test_runs_say_what_single_instructions_say(made: Metadata, protocol: int) -> None:
    data = pickle.dumps(made, protocol)
    assert outcome(load_dcp_index, data) == outcome(slowly, data)


@pytest.mark.parametrize("shape", [(), (5,), (5, 2), (5, 2, 3)])
@pytest.mark.parametrize("shares", [False, True])
def test_what_follows_a_run_refers_to_the_right_objects(shape: tuple[int, ...], shares: bool) -> None:
    # A shape of no dimensions takes one number less in the memo: all later references go by these numbers.
    data = pickle.dumps(index({"a": (3, 4), "b": shape, "c": shape, "d": (2,)}, 3, 300, shares=shares, whole=False), 4)
    assert outcome(in_runs, data) == outcome(slowly, data)


PLAIN = pickle.dumps(index({"a": (3, 4), "b": (300, 2, 1)}, 4, 1 << 20, shares=False, whole=False), 4)


@settings(max_examples=300, deadline=20_000)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_mean_the_same_in_runs(changes: list[tuple[float, int]]) -> None:
    data = bytearray(PLAIN)
    for where, byte in changes:
        data[int(where * len(data))] = byte
    assert outcome(load_dcp_index, bytes(data)) == outcome(slowly, bytes(data))


@pytest.mark.parametrize(("expression", "one", "other"), [(_BOX, 2, 6), (_STORED, 17, 19)], ids=["boxes", "places"])
def test_fields_in_another_order_are_told_apart(expression: re.Pattern[bytes], one: int, other: int) -> None:
    match = [*expression.finditer(PLAIN)][-1]
    (begin, end), (later, last) = match.span(one), match.span(other)
    data = PLAIN[:begin] + match[other] + PLAIN[end:later] + match[one] + PLAIN[last:]
    found = outcome(load_dcp_index, data)
    assert found == outcome(slowly, data) != outcome(slowly, PLAIN)
    assert isinstance(found, SavedIndex)


@pytest.mark.parametrize("shares", [False, True])
def test_nearly_all_boxes_of_a_large_index_are_read_in_runs(shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {f"layers.{i}.weight": (64, 128) for i in range(50)}
    data = pickle.dumps(index(made, 8, 1 << 20, shares=shares, whole=False), 4)
    counts = {"boxes": 0, "places": 0}

    def counted(run: Any, what: str) -> Any:
        def wrapper(*args: Any) -> Any:
            found = run(*args)
            counts[what] += sum(type(one) is Chunk or what == "places" for one in found[0])
            return found

        return wrapper

    before = IndexRuns.__init__

    def made_counted(self: IndexRuns) -> None:
        before(self)
        self.by_name = {
            name: counted(run, what) for (name, run), what in zip(self.by_name.items(), counts, strict=True)
        }

    monkeypatch.setattr(IndexRuns, "__init__", made_counted)
    load_dcp_index(data, PATH)
    # The first names classes and fields; the other 399 refer to them. A place has two objects.
    assert counts["boxes"] >= 380
    assert counts["places"] >= 2 * 380
