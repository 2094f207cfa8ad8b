"""A load of a DCP directory that trusts nothing and leaves nothing out.

Each rank finds by itself which parts of the stored boxes it needs: the index says where they are. So ranks need to
tell each other nothing but what failed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors as flatten_sharded_tensors
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.planner_helpers import _init_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from shardsmith.errors import CheckpointError, MismatchError
from shardsmith.formats.dcp.beside_weights import BesideWeights, Box, open_step
from shardsmith.formats.dcp.index import DcpIndex
from shardsmith.formats.dcp.single_read import Wanted, find_wanted, read_files
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.ground.garbage import without_collection
from shardsmith.manifest.metadata import FileRecord
from shardsmith.sharding.local_boxes import local_boxes
from shardsmith.tensors.narrowing import LostValues


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
        directory: A DCP directory.
        process_group: The ranks that call; None for all.
        allow_pickle: Read values of any type, **which runs whatever code they hold**. Only for authors you trust.
        allow_cast: Convert tensors that were saved in another dtype, if that has room for all finite values.
        follow_links: Accept files that are symbolic links, as in a Hugging Face cache.

    Raises:
        MismatchError: naming all keys that are missing or have another kind, global shape or dtype; nothing was
            loaded. Or naming all that have finite values beyond the range of the dtype asked for: tensors were filled.
        CheckpointError: when the directory cannot be read; see ``read_index`` and ``DcpSource``. On a rank on which
            nothing failed, the errors of the others.
    """
    load = LocalLoad(
        state_dict, Path(directory), allow_pickle=allow_pickle, allow_cast=allow_cast, follow_links=follow_links
    )
    with contextlib.closing(load):
        _on_all(load.compare, load.directory, process_group)
        _on_all(load.fill, load.directory, process_group)


class LocalLoad:
    """What one rank does in a load. No communication.

    Attributes:
        directory: What is loaded.
    """

    def __init__(
        self,
        state_dict: dict[str, Any],
        directory: Path,
        *,
        allow_pickle: bool = False,
        allow_cast: bool = False,
        follow_links: bool = False,
    ) -> None:
        """The arguments are those of ``load_into``."""
        self.directory = directory
        self._state_dict = state_dict
        self._allow_pickle = allow_pickle
        self._allow_cast = allow_cast
        self._follow_links = follow_links
        self._source: DcpSource | None = None
        self._lost = LostValues()

    @without_collection()
    def compare(self) -> None:
        """Open the directory and compare all that is asked for with all that is stored; nothing is changed.

        Raises:
            MismatchError, CheckpointError: as ``load_into``.
        """
        self._source = open_step(self.directory, follow_links=self._follow_links, to_load=True)
        owners = sorted(self._state_dict.items())
        self._state = {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in owners}
        _materialize(self._state)
        self._wanted, self._paths = flatten_state_dict(self._state)
        if any(isinstance(value, ShardedTensor) for value in self._wanted.values()):
            self._wanted = flatten_sharded_tensors(self._wanted)
        compare(self._wanted, self._source.index, self._allow_cast)

    def fill(self) -> None:
        """Fill the state dict; objects first, for one of them may be refused. After ``compare``."""
        objects = self._read_objects()
        self.fill_tensors({})
        self._hand_back(objects)

    @without_collection()
    def wanted_bytes(self) -> dict[str, int]:
        """Return how many bytes of each file this rank is about to read for its tensors. After ``compare``."""
        wanted = self._wanted_chunks.items()
        return {name: sum(one.part.numel * one.dtype.itemsize for one in parts) for name, parts in wanted}

    def fill_tensors(self, verified: Mapping[str, FileRecord]) -> list[str]:
        """Fill the tensors, in one pass over the files; see ``read_files``. After ``compare``.

        Args:
            verified: The files that this rank is to hash meanwhile.

        Returns:
            What is wrong with those, a line each. If anything is, what was filled must not be used.

        Raises:
            MismatchError, CheckpointError: as ``load_into``.
        """
        assert self._source is not None, "compare comes first"
        damage = read_files(self._source, self._wanted_chunks, verified, follow_links=self._follow_links)
        if isinstance(self._source, BesideWeights) and not damage:
            elsewhere = [box for box in self._wanted_boxes if self._source.is_elsewhere(box[0])]
            self._source.fill(elsewhere, self._lost)
        if not damage:
            cure = "Do not use them: load into tensors of bfloat16 or float32."
            self._lost.refuse(self.directory, "Tensors were filled with infinities.", cure)
        return damage

    def fill_objects(self) -> None:
        """Read what is no tensor, and hand all back to its owners. After ``fill_tensors``."""
        self._hand_back(self._read_objects())

    @functools.cached_property
    def _wanted_chunks(self) -> dict[str, list[Wanted]]:
        source = self._source
        assert source is not None, "compare comes first"
        return find_wanted(source, (box for box in self._wanted_boxes if not source.is_elsewhere(box[0])), self._lost)

    @functools.cached_property
    def _wanted_boxes(self) -> list[Box]:
        tensors = ((key, value) for key, value in self._wanted.items() if isinstance(value, Tensor))
        return [(key, box, values.detach()) for key, value in tensors for box, values in local_boxes(value)]

    @without_collection()
    def _read_objects(self) -> dict[str, Any]:
        assert self._source is not None, "compare comes first"
        keys = [key for key, value in self._wanted.items() if not isinstance(value, Tensor)]
        return {key: self._source.read_object(key, allow_pickle=self._allow_pickle) for key in keys}

    def _hand_back(self, objects: Mapping[str, Any]) -> None:
        for key, stored in objects.items():
            set_element(self._state, self._paths[key], stored)
        for key, owner in [*self._state_dict.items()]:
            if isinstance(owner, Stateful):
                owner.load_state_dict(self._state[key])
            else:
                self._state_dict[key] = self._state[key]

    def close(self) -> None:
        """Close the files."""
        if self._source is not None:
            self._source.close()


def _materialize(state_dict: dict[str, Any]) -> None:
    """Give tensors on the meta device memory, as torch does. A ShardedTensor without a shard on this rank has none."""
    tensors = (value for value in flatten_state_dict(state_dict)[0].values() if isinstance(value, Tensor))
    if any(values.is_meta for value in tensors for _, values in local_boxes(value)):
        _init_state_dict(state_dict)


def _on_all(act: Callable[[], None], directory: Path, group: dist.ProcessGroup | None) -> None:
    """Do something on all ranks of a group; what fails on one of them is an error on all."""
    error: Exception | None = None
    try:
        act()
    except Exception as failed:  # raised when the others know
        error = failed
    errors = [error and f"{type(error).__name__}: {error}"]
    if dist.is_available() and dist.is_initialized():
        errors *= dist.get_world_size(group)
        dist.all_gather_object(errors, errors[0], group=group)
    if error is not None:
        raise error
    causes = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
    if causes:
        raise CheckpointError(directory, "\n  ".join(["could not be loaded", *causes]))


def compare(wanted: Mapping[str, Any], index: DcpIndex, allow_cast: bool) -> None:
    """Return when every key is stored with the kind, global shape and dtype that is wanted.

    Args:
        wanted: Flat; tensors are compared, of other values only the key and that they are no tensors.
        index: The index of the directory.
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
