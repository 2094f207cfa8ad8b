"""A load through torch.distributed.checkpoint that reads from a source of ours and compares everything first.

torch plans the load (which rank needs which part of which DTensor) and carries errors from rank to rank; the reading,
the comparing and the unpacking of objects are replaced.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from shardsmith.dcp_index import DcpIndex
from shardsmith.errors import CheckpointError, MismatchError, ShardsmithError
from shardsmith.tensors import Chunk, TensorSource, read_into


class ObjectSource(TensorSource, Protocol):
    """A source of tensors and of other values, with a DCP index."""

    index: DcpIndex

    def read_object(self, key: str, *, allow_pickle: bool = False) -> Any:
        """A value that is no tensor."""
        ...


def load_through_torch(
    state_dict: dict[str, Any],
    directory: Path,
    open_source: Callable[[], ObjectSource],
    process_group: dist.ProcessGroup | None,
    *,
    allow_pickle: bool,
    allow_cast: bool,
) -> None:
    """Fill a state dict in place; see ``dcp.load_into``."""
    attempt = _Attempt(directory, open_source)
    planner = _StrictPlanner(attempt, allow_pickle, allow_cast)
    try:
        with _single_process_is_fine():
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

    def __init__(self, directory: Path, open_source: Callable[[], ObjectSource]) -> None:
        self.directory = directory
        self.source: ObjectSource | None = None
        self.error: Exception | None = None
        try:
            self.source = open_source()
        except Exception as error:  # raised later: the other ranks are about to wait for us in torch
            self.error = error

    def run(self, part: Callable[[ObjectSource], None]) -> None:
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

    def load_object(self, source: ObjectSource, key: str) -> None:
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
        return Metadata({}) if source is None else source.index.metadata

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


def _read(source: ObjectSource, plan: LoadPlan, planner: LoadPlanner) -> None:
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


@contextlib.contextmanager
def _single_process_is_fine() -> Generator[None, None, None]:
    """torch warns when there is no process group; a load in one process is nothing to warn about."""
    with warnings.catch_warnings():
        if not (dist.is_available() and dist.is_initialized()):
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
