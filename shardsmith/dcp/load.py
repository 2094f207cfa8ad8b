"""A load through torch.distributed.checkpoint that trusts nothing and leaves nothing out.

torch plans the load (which rank needs which part of which DTensor) and carries errors from rank to rank; the index,
the comparing, the reading and the unpacking of objects are ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from shardsmith.dcp.index import DcpEntry, DcpIndex
from shardsmith.dcp.source import DcpSource
from shardsmith.errors import CheckpointError, MismatchError, ShardsmithError
from shardsmith.ranks import single_process_is_fine
from shardsmith.tensors import Chunk, read_into


def load_into(
    state_dict: dict[str, Any],
    directory: str | Path,
    *,
    process_group: dist.ProcessGroup | None = None,
    allow_pickle: bool = False,
    allow_cast: bool = False,
    follow_links: bool = False,
) -> None:
    """Fill a state dict from a DCP directory, of which everything asked for must be stored just so.

    All ranks of the group call it with the same keys. Communicates (object collectives of the group) from the calling
    thread; without an initialised process group it loads into this process alone. What is stored and not asked for is
    passed over.

    Args:
        state_dict: Nested or flat, of tensors, DTensors, ShardedTensors and other values, as for
            ``torch.distributed.checkpoint.load``. Tensors are filled in place, other values are replaced.
        allow_pickle: Read values of any type, **which runs whatever code they hold**. Only for authors you trust.
        allow_cast: Convert tensors that were saved in another dtype.
        follow_links: Accept files that are symbolic links, as in a Hugging Face cache.

    Raises:
        MismatchError: naming all keys that are missing or have another kind, global shape or dtype. Nothing was loaded.
        CheckpointError: when the directory cannot be read; see ``read_index`` and ``DcpSource``. On a rank on which
            nothing failed, the errors of the others.
    """
    attempt = _Attempt(Path(directory), follow_links)
    planner = _StrictPlanner(attempt, allow_pickle, allow_cast)
    try:
        with single_process_is_fine():
            load(state_dict, storage_reader=_SourceReader(attempt), planner=planner, process_group=process_group)
    except CheckpointException as error:  # derives from BaseException: it would pass through `except Exception`
        raise attempt.error_of(error) from error
    finally:
        attempt.close()


class _Attempt:
    """What the reader and the planner of one load share: the source, and what went wrong on this rank.

    torch sends the errors of each rank to all others, by pickle. Only their text makes the trip; the error itself, with
    its type and attributes, stays here and is raised on this rank in the end.
    """

    def __init__(self, directory: Path, follow_links: bool) -> None:
        self.directory = directory
        self.source: DcpSource | None = None
        self.error: Exception | None = None
        try:
            self.source = DcpSource(directory, follow_links=follow_links)
        except Exception as error:  # raised later: the other ranks are about to wait for us in torch
            self.error = error

    def run(self, part: Callable[[DcpSource], None]) -> None:
        """Do a part of the load on the source, or tell torch why it cannot be done."""
        try:
            if self.source is not None:
                part(self.source)
        except Exception as error:
            self.error = error
        if self.error is not None:
            raise RuntimeError(f"{type(self.error).__name__}: {self.error}")

    def error_of(self, error: CheckpointException) -> Exception:
        """What to raise on this rank."""
        if isinstance(self.error, ShardsmithError):
            return self.error
        causes = [f"rank {rank}: {cause[0]}" for rank, cause in sorted(error.failures.items())]
        return CheckpointError(self.directory, "\n  ".join(["could not be loaded", *causes]))

    def close(self) -> None:
        if self.source is not None:
            self.source.close()


class _StrictPlanner(DefaultLoadPlanner):
    """Compares all that is asked for with all that is stored before anything is planned."""

    def __init__(self, attempt: _Attempt, allow_pickle: bool, allow_cast: bool) -> None:
        super().__init__()
        self._attempt = attempt
        self._allow_pickle = allow_pickle
        self._allow_cast = allow_cast

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The parent replaces meta tensors, so the comparison comes first.
        self._attempt.run(lambda source: compare(flatten_state_dict(state_dict)[0], source.index, self._allow_cast))
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        """Without the parent's search for the keys of torch 2.3, which were not compared."""
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata, strict=True)

    def load_object(self, source: DcpSource, key: str) -> None:
        """Put a value that is no tensor into its place in the state dict."""
        value = source.read_object(key, allow_pickle=self._allow_pickle)
        set_element(self.original_state_dict, self.mappings[key], value)


class _SourceReader(StorageReader):
    """Reads what torch planned from a source."""

    def __init__(self, attempt: _Attempt) -> None:
        super().__init__()
        self._attempt = attempt

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        return self._attempt.directory

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        """The checked index. An error waits for the planner: here torch would log it and look for another index."""
        source = self._attempt.source
        return Metadata({}) if source is None else metadata_for_torch(source.index)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        self._attempt.run(lambda source: _read(source, plan, planner))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()


def _read(source: DcpSource, plan: LoadPlan, planner: LoadPlanner) -> None:
    """Load all items; objects first, for one of them may be refused."""
    assert isinstance(planner, _StrictPlanner)
    for item in plan.items:
        if item.type is LoadItemType.BYTE_IO:
            planner.load_object(source, item.storage_index.fqn)
    for item in plan.items:
        if item.type is LoadItemType.TENSOR and 0 not in item.lengths:
            target = planner.resolve_tensor(item).detach()
            read_into(source, item.storage_index.fqn, _box(item), target)
            planner.commit_tensor(item, target)


def _box(item: ReadItem) -> Chunk:
    """The part of the global tensor that an item asks for: torch counts from the start of a stored chunk."""
    assert item.storage_index.offset is not None
    offsets = tuple(a + b for a, b in zip(item.storage_index.offset, item.storage_offsets, strict=True))
    return Chunk(offsets, tuple(item.lengths))


def metadata_for_torch(index: DcpIndex) -> Metadata:
    """The checked index, as far as torch needs it to plan: without empty and repeated chunks and without files."""
    tensors = {name: _tensor_metadata(entry) for name, entry in index.tensors.items()}
    return Metadata(tensors | {name: BytesStorageMetadata() for name in index.objects})


def _tensor_metadata(entry: DcpEntry) -> TensorStorageMetadata:
    boxes = [stored.chunk for stored in entry.chunks]
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=entry.spec.dtype),
        size=torch.Size(entry.spec.shape),
        chunks=[ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in boxes],
    )


def compare(wanted: Mapping[str, Any], index: DcpIndex, allow_cast: bool) -> None:
    """Return when every key is stored with the kind, global shape and dtype that is wanted.

    Args:
        wanted: Flat; tensors are compared, of other values only the key and that they are no tensors.
        allow_cast: Accept any dtype.

    Raises:
        MismatchError: naming all keys at fault.
    """
    problems = [line for key, value in wanted.items() if (line := _problem(key, value, index, allow_cast))]
    if problems:
        summary = f"{len(problems)} of {len(wanted)} entries are not stored as they were asked for"
        raise MismatchError(index.path, summary, problems, _advice(wanted, index))


def _problem(key: str, value: Any, index: DcpIndex, allow_cast: bool) -> str | None:
    entry = index.tensors.get(key)
    if entry is None and key not in index.objects:
        return f"{key}: not in the checkpoint"
    if entry is None:
        return f"{key}: saved as an object, a tensor was asked for" if isinstance(value, Tensor) else None
    if not isinstance(value, Tensor):
        return f"{key}: saved as a tensor, an object ({type(value).__name__}) was asked for"
    saved, asked = (entry.spec.shape, entry.spec.dtype), (tuple(value.size()), value.dtype)
    if saved == asked or (allow_cast and saved[0] == asked[0]):
        return None
    return f"{key}: saved {saved[0]} {saved[1]}, asked for {asked[0]} {asked[1]}"


def _advice(wanted: Mapping[str, Any], index: DcpIndex) -> str:
    """What to do about it. A whole state dict that lies one level deeper, or higher, is the most frequent cause."""
    nothing = "Nothing was loaded; the state dict is unchanged."
    absent = [key for key in wanted if key not in index.containers]
    if not absent:
        return f"{nothing} Use the model that was saved; for another dtype pass allow_cast=True."
    first = absent[0]
    for key in index.containers:
        if key.endswith(f".{first}") and all(key.removesuffix(first) + k in index.containers for k in absent):
            return (
                f"{nothing} The keys are stored below {key.removesuffix('.' + first)!r}: nest the state dict in that."
            )
    inner = first.partition(".")[2]
    if inner in index.containers:
        return f"{nothing} The keys are stored without {first.partition('.')[0]!r}: pass the inner state dict."
    return f"{nothing} Ask only for what was saved."
