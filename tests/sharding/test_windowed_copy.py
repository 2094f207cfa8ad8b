"""A copy in windows gives what a whole copy gives, in bounded memory, and leaves no thread waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardsmith.errors import WriteError
from shardsmith.formats.dcp.rank_file import RankFile, RankFileWritten, write_rank_file
from shardsmith.hooks import ShardedSave, at
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from shardsmith.run_state import save as save_module
from shardsmith.sharding.live_boxes import StagingBuffer
from shardsmith.sharding.windowed_copy import WindowedCopy
from tests.hooks.test_save import digests
from tests.hooks.training import run_training
from tests.ranks import run_on_ranks


def tensors() -> list[Tensor]:
    return [torch.arange(n, dtype=dtype) for n in (5, 300, 1, 70, 0, 64) for dtype in (torch.float32, torch.int64)]


def dtypes_of(tensors: list[Tensor]) -> list[torch.dtype]:
    return [tensor.dtype for tensor in tensors]


def taken_from(copy: WindowedCopy) -> Iterator[Tensor]:
    return chain.from_iterable(copy.take_windows())


@pytest.mark.parametrize("most_bytes", [1, 64, 1000, 4000, 10**6])
def test_what_is_taken_is_what_was_there(most_bytes: int) -> None:
    buffer, expected = StagingBuffer(), tensors()
    copy = WindowedCopy(expected, dtypes_of(expected), (buffer, buffer.beside), most_bytes)
    taken: list[Tensor] = []
    thread = threading.Thread(target=lambda: taken.extend(one.clone() for one in taken_from(copy)))
    thread.start()
    copy.fill()
    for one in expected:
        one.zero_()  # all is copied when ``fill`` returns
    thread.join(60)
    assert all(torch.equal(one, other) for one, other in zip(taken, tensors(), strict=True))
    largest = max(one.nbytes for one in expected)
    assert len(buffer._memory) + len(buffer.beside._memory) <= max(most_bytes, 2 * largest) + 24 * 64


def test_whoever_copies_is_let_go_when_nobody_takes_any_more() -> None:
    buffer = StagingBuffer()
    copy = WindowedCopy(tensors(), dtypes_of(tensors()), (buffer, buffer.beside), 64)
    thread = threading.Thread(target=copy.fill)
    thread.start()
    next(copy.take_windows())
    copy.stop()
    thread.join(60)
    assert not thread.is_alive()


def test_an_error_of_the_copy_is_raised_where_it_is_taken() -> None:
    class Broken(StagingBuffer):
        def copy(self, *_: object) -> list[Tensor]:
            raise MemoryError("no pinned memory")

    copy = WindowedCopy(tensors(), dtypes_of(tensors()), (StagingBuffer(), Broken()), 64)
    thread = threading.Thread(target=copy.fill)
    thread.start()
    with pytest.raises(MemoryError, match="no pinned memory"):
        [*copy.take_windows()]
    thread.join(60)
    assert not thread.is_alive()


def test_runs_with_a_bound_save_the_same(tmp_path: Path) -> None:
    run_on_ranks(train, 2, tmp_path, tmp_path / "whole", None)
    for name, bound in (("bytes", 100), ("text", "1kB"), ("enough", "1GB")):
        run_on_ranks(train, 2, tmp_path, tmp_path / name, bound)
        assert digests(tmp_path / name / "step-5") == digests(tmp_path / "whole" / "step-5")
        assert find_damage(tmp_path / name / "step-5") == []


def train(directory: Path, bound: str | int | None) -> None:
    run_training(directory, 5, max_host_memory=bound)


def test_a_save_that_cannot_be_written_ends_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = ShardedSave(tmp_path, model=torch.nn.Linear(40, 40), when=at(10**9), max_host_memory=100)

    def without_a_directory(file: RankFile, values: Any, objects: Any, directory: Path) -> RankFileWritten:
        return write_rank_file(file, values, objects, directory / "gone")

    with monkeypatch.context() as patch:
        patch.setattr(save_module, "write_rank_file", without_a_directory)
        save.save(1)
        with pytest.raises(WriteError, match="gone"):
            save.saving(1).result(60)
    with pytest.raises(WriteError, match="gone"):
        save.save(2)
    save.save(3)
    save.close()
    assert committed_steps(tmp_path) == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]
