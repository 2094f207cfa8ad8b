"""What the writer of a DCP index makes, and how it goes about it."""

from __future__ import annotations

import pickle

import pytest
import torch

from shardsmith.formats.dcp import index_writer
from shardsmith.formats.dcp.shard_files import Place, PlannedChunk
from shardsmith.tensors.tensors import Chunk, TensorSpec

COUNT = 5000


def test_a_large_index_is_made_in_pieces_between_which_other_threads_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[index_writer._Pieces] = []

    class Watched(index_writer._Pieces):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(index_writer, "_Pieces", Watched)
    names = [f"layers.{i}.weight" for i in range(COUNT)]
    content = index_writer.write_index(
        {name: TensorSpec(name, (4, 4), torch.float32) for name in names},
        [PlannedChunk(name, 0, Chunk((0, 0), (4, 4)), 64) for name in names],
        {i: Place("__0_0.distcp", 64 * i, 64) for i in range(COUNT)},
        aliases={},
        containers={},
        attempt="0" * 16,
    )
    (out,) = made
    assert b"".join(out.pieces) == content
    assert max(map(len, out.pieces)) < 2 * 65536 < len(content)
    index = pickle.loads(content)
    assert list(index.state_dict_metadata) == names
    assert [info.offset for info in index.storage_data.values()] == [64 * i for i in range(COUNT)]
