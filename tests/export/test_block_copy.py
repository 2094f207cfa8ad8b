from __future__ import annotations

import contextlib
import itertools
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from shardsmith.errors import CheckpointError, MismatchError, WriteError
from shardsmith.export.block_copy import copy_blocks
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.formats.safetensors_files.plan import plan_files
from shardsmith.formats.safetensors_files.source import SafetensorsSource
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.ground.threads import useful_threads
from shardsmith.tensors.digest import Digest, digest_tensor
from shardsmith.tensors.tensors import Chunk, TensorSource, TensorSpec
from tests import dcp_directories
from tests.tensor_cases import partitions, random_tensor, tensors

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Sharded(Tensor):
    """A tensor that ``torch.distributed.checkpoint`` saves in boxes of its own."""

    boxes: list[Chunk]

    @staticmethod
    def of(tensor: Tensor, boxes: list[Chunk]) -> Sharded:
        sharded = tensor.as_subclass(Sharded)
        sharded.boxes = [box for box in boxes if box.numel] or [Chunk.whole(tuple(tensor.shape))]
        return sharded

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self)
        items = []
        for number, box in enumerate(self.boxes):
            chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            data = TensorWriteData(chunk, properties, self.size())
            index = MetadataIndex(fqn, chunk.offsets, number)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        raise NotImplementedError

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.as_subclass(Tensor)[self.boxes[index.index].within(Chunk.whole(tuple(self.shape)))]


def copied(
    source: TensorSource, dtype: torch.dtype | None = None, progress: Callable[[int], None] | None = None
) -> tuple[bytes, dict[str, Digest]]:
    """The file that the source's tensors become, and their digests."""
    specs = [TensorSpec(spec.name, spec.shape, dtype or spec.dtype) for spec in source.specs.values()]
    with tempfile.TemporaryDirectory() as directory:
        with SafetensorsFileWriter.create(Path(directory), plan_files(specs).files[0]) as writer:
            digests = copy_blocks(source, [writer], progress)
        return (Path(directory) / "model.safetensors").read_bytes(), digests


def copied_from_dcp(
    named: dict[str, Tensor], boxes: dict[str, list[Chunk]], dtype: torch.dtype | None = None
) -> tuple[bytes, dict[str, Digest]]:
    """The same, of tensors that were saved with ``torch.distributed.checkpoint`` in these boxes."""
    with tempfile.TemporaryDirectory() as directory:
        sharded = {name: Sharded.of(tensor, boxes[name]) for name, tensor in named.items()}
        return copied(DcpSource(dcp_directories.save(sharded, Path(directory) / "dcp")), dtype)


def assert_copied(found: tuple[bytes, dict[str, Digest]], expected: dict[str, Tensor]) -> None:
    assert found[0] == save(expected, {"format": "pt"})
    assert found[1] == {name: digest_tensor(tensor) for name, tensor in expected.items()}


@given(st.lists(tensors(), max_size=4), st.data())
def test_any_sharding_of_any_tensors_becomes_the_file_of_the_library(found: list[Tensor], data: st.DataObject) -> None:
    named = {f"layer.{i}": tensor for i, tensor in enumerate(found)}
    boxes = {name: data.draw(partitions(tuple(tensor.shape))) for name, tensor in named.items()}
    assert_copied(copied_from_dcp(named, boxes), named)


@given(st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.lists(st.integers(0, 9), max_size=3), st.data())
def test_any_sharding_is_cast_as_torch_casts(
    stored: torch.dtype, wanted: torch.dtype, shape: list[int], data: st.DataObject
) -> None:
    tensor = random_tensor(tuple(shape), stored, seed=data.draw(st.integers(0, 2**32))).nan_to_num(0.1)
    boxes = {"a": data.draw(partitions(tuple(shape)))}
    lost = tensor.isfinite() & ~tensor.to(wanted).isfinite()
    if (stored, wanted) != (torch.float32, torch.bfloat16) and lost.any():
        with pytest.raises(MismatchError, match="a: up to "):
            copied_from_dcp({"a": tensor}, boxes, wanted)
    else:
        assert_copied(copied_from_dcp({"a": tensor}, boxes, wanted), {"a": tensor.to(wanted)})


def test_all_tensors_with_values_beyond_the_range_of_the_dtype_are_named_and_infinities_stay() -> None:
    named = {name: torch.zeros(3, 4) for name in ("a", "b", "c", "d")}
    named["a"][1, 2], named["b"][0, 0], named["c"][2, 3], named["d"][0, 1] = 1e6, -7e4, torch.inf, torch.nan
    boxes = {name: halves() for name in named}
    with pytest.raises(MismatchError, match="2 tensors have finite values that would be infinite") as error:
        copied_from_dcp(named, boxes, torch.float16)
    assert error.value.problems == ["a: up to 1e+06", "b: up to 70000"]
    meant = {name: named[name] for name in ("c", "d")}
    assert_copied(copied_from_dcp(meant, boxes, torch.float16), {name: one.half() for name, one in meant.items()})
    assert_copied(copied_from_dcp(named, boxes, torch.bfloat16), {name: one.bfloat16() for name, one in named.items()})


def halves() -> list[Chunk]:
    return [Chunk((0, 0), (3, 2)), Chunk((0, 2), (3, 2))]


def grid(shape: tuple[int, ...], *parts: int) -> list[Chunk]:
    """Boxes as ``torch.chunk`` cuts each dimension: uneven, the last ones smaller or missing."""
    cuts = []
    for size, count in zip(shape, parts, strict=True):
        step = -(-size // count)
        cuts.append([(start, min(step, size - start)) for start in range(0, size, step)])
    return [Chunk(*map(tuple, zip(*box, strict=True))) for box in itertools.product(*cuts)]


LARGE = {  # all are several blocks long
    "whole": ((1100, 13, 257), (1, 1, 1)),
    "Shard(0)": ((1100, 13, 257), (4, 1, 1)),
    "Shard(1)": ((1100, 13, 257), (1, 4, 1)),
    "Shard(0), Shard(2)": ((1100, 13, 257), (3, 1, 2)),
    "rows longer than a block": ((2, 3, 600_000), (1, 2, 1)),
    "rows longer than a block, Shard(2)": ((2, 3, 600_000), (2, 1, 2)),
}


@pytest.mark.parametrize(("shape", "parts"), LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_tensors_of_many_blocks_are_put_together(
    wanted: torch.dtype, shape: tuple[int, ...], parts: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = copied_from_dcp({"a": tensor}, {"a": grid(shape, *parts)}, wanted)
    assert_copied(found, {"a": tensor.to(wanted)})


def safetensors_of(named: dict[str, Tensor], directory: Path) -> Path:
    save_file(named, directory / "source.safetensors")
    return directory / "source.safetensors"


def test_progress_adds_up_to_the_bytes_of_all_tensors(tmp_path: Path) -> None:
    named = {"a": torch.randn(3_000_000), "b": torch.randn(()), "c": torch.empty(0)}
    steps: list[int] = []
    copied(SafetensorsSource(safetensors_of(named, tmp_path)), torch.float16, steps.append)
    assert sum(steps) == 6_000_002
    assert len(steps) == 4


class Unreadable(SafetensorsSource):
    """Fails at its first tensor, and counts what is asked of it."""

    asked = 0

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        self.asked += 1
        if name == "layer.0":
            raise CheckpointError(self.path, f"cannot read {name}")
        yield from super().pieces(name, box)


def test_an_error_in_one_thread_stops_the_others_and_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardsmith.ground.threads._LEAST_MEAN_BYTES", 0)  # threads for small blocks, too
    source = Unreadable(safetensors_of({f"layer.{i}": torch.zeros(1) for i in range(5000)}, tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot read layer\.0"):
        copied(source)
    assert source.asked < 5000
    assert not copying_threads()


def test_thousands_of_small_tensors_are_left_to_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert useful_threads(nbytes=10_000 * 1024, blocks=10_000) == 1
    assert useful_threads(nbytes=1 << 30, blocks=512) == 4


def test_a_failed_write_is_raised(tmp_path: Path) -> None:
    source = SafetensorsSource(safetensors_of({"a": torch.zeros(4)}, tmp_path))
    writer = SafetensorsFileWriter.create(tmp_path, plan_files(source.specs.values()).files[0])
    writer.close()
    with pytest.raises(WriteError, match="Bad file descriptor"):
        copy_blocks(source, [writer])


def copying_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("shardsmith-copy")]


def test_an_interrupt_leaves_no_thread_that_goes_on_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardsmith.ground.threads._LEAST_MEAN_BYTES", 0)  # several threads
    source = SafetensorsSource(safetensors_of({f"layer.{i}": torch.zeros(1) for i in range(10_000)}, tmp_path))
    steps = []

    def interrupt(nbytes: int) -> None:
        if not steps:
            os.kill(os.getpid(), signal.SIGINT)
        steps.append(nbytes)

    with pytest.raises(KeyboardInterrupt):
        copied(source, progress=interrupt)
    deadline = time.monotonic() + 60
    while copying_threads():  # one that was just being started when the interrupt came finds nothing to do
        assert time.monotonic() < deadline
    assert len(steps) < 10_000


@pytest.mark.parametrize("source_type", [SafetensorsSource, Unreadable])
def test_torch_has_as_many_threads_afterwards_as_before(source_type: type[SafetensorsSource], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    source = source_type(safetensors_of({"layer.0": torch.zeros(4)}, tmp_path))
    try:
        torch.set_num_threads(3)
        with contextlib.suppress(CheckpointError):
            copied(source, progress=lambda _: None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_operators_in_the_copying_threads_use_one_thread(tmp_path: Path) -> None:
    source = SafetensorsSource(safetensors_of({"a": torch.zeros(4)}, tmp_path))
    counts: list[int] = []
    copied(source, progress=lambda _: counts.append(torch.get_num_threads()))
    assert counts == [1]
