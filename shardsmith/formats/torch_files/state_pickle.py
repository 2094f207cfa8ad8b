"""What the ``data.pkl`` of a saved state dict says: its tensors, and, of sharded ones, which boxes this file holds.

A ShardedTensor of FSDP1 cannot be unpickled by torch outside the job that saved it, and a DTensor not without the
device mesh that it was on; but both say in plain numbers where their local part lies, and that is all that is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardsmith.formats.torch_files.pickle_machine import ORDERED_DICT, Made, Name, read_pickle
from shardsmith.formats.torch_files.tensor_pickle import (
    TENSOR_NAMES,
    TensorRecord,
    UnusualPickleError,
    is_tensor,
    tensor_record,
)
from shardsmith.tensors.checkpoint_keys import KeyPath, average_above
from shardsmith.tensors.tensors import Chunk, Shape

MAX_STATE_PICKLE_BYTES = 1 << 28
MAX_DEPTH = 32
"""Of dicts in a state dict."""


@dataclass(frozen=True, slots=True)
class SavedPart:
    """A box of a global tensor and the bytes that hold it."""

    box: Chunk
    record: TensorRecord


@dataclass(frozen=True, slots=True)
class SavedState:
    """One tensor of a state dict, as far as one file holds it."""

    shape: Shape
    """Global."""
    dtype: torch.dtype
    parts: tuple[SavedPart, ...]
    """Without empty ones."""
    is_sharded: bool
    """Whether it says itself that it is a part of something larger."""


_FROM_TYPE = Name("torch._tensor", "_rebuild_from_type_v2")
_WRAPPER = Name("torch._utils", "_rebuild_wrapper_subclass")
_SHARDED = Name("torch.distributed._shard.sharded_tensor.api", "ShardedTensor")
_SHARD = Name("torch.distributed._shard.sharded_tensor.shard", "Shard")
_SHARD_PLACE = Name("torch.distributed._shard.metadata", "ShardMetadata")
_SHARDED_FACTS = Name("torch.distributed._shard.sharded_tensor.metadata", "ShardedTensorMetadata")
_DTENSORS = {Name("torch.distributed.tensor", "DTensor"), Name("torch.distributed._tensor.api", "DTensor")}
_MESH = Name("torch.distributed.device_mesh", "DeviceMesh")
_LAYOUTS = {Name("torch.distributed._mesh_layout", name) for name in ("_FlatLayout", "_MeshLayout")}
_SPECS = {
    Name("torch.distributed.tensor._dtensor_spec", "DTensorSpec"),
    Name("torch.distributed._tensor.placement_types", "DTensorSpec"),
}
_PLACEMENTS = ("torch.distributed.tensor.placement_types", "torch.distributed._tensor.placement_types")
_SPLIT = {Name(module, "Shard") for module in _PLACEMENTS}
_STRIDED = {Name(module, "_StridedShard") for module in _PLACEMENTS}
"""Of FSDP2 around tensor parallel: a cut of what later dimensions of the mesh have left."""
_REPLICATED = {Name(module, "Replicate") for module in _PLACEMENTS}
_SIZE = Name("torch", "Size")
_BESIDE = {  # what sharded tensors carry with them and we have no use for
    Name("torch", "device"),
    Name("torch.serialization", "_get_layout"),
    Name("torch.distributed.remote_device", "_remote_device"),
    Name("torch.distributed._shard.sharded_tensor.api", "ShardedTensor.ProcessGroupState"),
    Name("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    Name("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    Name("torch.distributed._shard.sharding_spec.chunk_sharding_spec", "ChunkShardingSpec"),
    Name("torch.distributed._shard.sharding_spec.api", "EnumerableShardingSpec"),
    Name("torch.distributed.tensor._dtensor_spec", "ShardOrderEntry"),
    Name("torch.distributed.tensor._dtensor_spec", "TensorMeta"),
    Name("torch.distributed._tensor.placement_types", "TensorMeta"),
    Name("builtins", "getattr"),
    Name("__builtin__", "getattr"),
}
_NAMES = (
    TENSOR_NAMES
    | _DTENSORS
    | _LAYOUTS
    | _SPECS
    | _SPLIT
    | _STRIDED
    | _REPLICATED
    | _BESIDE
    | {_FROM_TYPE, _WRAPPER, _SHARDED, _SHARD, _SHARD_PLACE, _SHARDED_FACTS, _MESH, _SIZE}
)


def read_state_pickle(data: bytes, path: Path) -> dict[KeyPath, SavedState]:
    """The tensors in a nested state dict by their path in it. What is no tensor is left out.

    So is what lies in lists, but for lists in what is called an average: that must not be passed over in silence.

    Raises:
        UnusualPickleError: it holds tensors of a kind that this cannot describe.
        UnsafeCheckpointError: it names something that plain, ShardedTensors and DTensors do not need.
        CorruptCheckpointError: it is no pickle of that kind.
    """
    state = read_pickle(data, path, _NAMES, persistent_ids=True)
    # The parts of a pickle may be shared, so a short one can describe a dict of any size.
    # An honest entry takes more than one byte of the pickle.
    budget = len(data)
    found: dict[KeyPath, SavedState] = {}
    for keys, value in _leaves(state, ()):
        budget -= 1
        if budget < 0:
            raise UnusualPickleError("its parts contain each other in a cycle")
        if (saved := _saved(value)) is not None:
            found[keys] = saved
    return found


def read_plain(data: bytes, path: Path, key: str) -> object:
    """What the pickled dict has under a key, if that is made of numbers, texts, tuples, lists and dicts; None without.

    Raises:
        UnusualPickleError: it is made of more than that, or the pickle is no dict.
        UnsafeCheckpointError, CorruptCheckpointError: as ``read_state_pickle``.
    """
    state = read_pickle(data, path, _NAMES, persistent_ids=True)
    items = state.items if type(state) is Made and state.of == ORDERED_DICT else state
    if type(items) is not dict:
        raise UnusualPickleError("it holds no dict")
    # As above: what is shared counts as often as it is there, so that it cannot grow with the depth.
    return _plain(items.get(key), iter(range(len(data))), 0)


def _plain(value: object, budget: Iterator[int], depth: int) -> Any:
    """``budget`` gives one item for each value that may be made."""
    if next(budget, None) is None:
        raise UnusualPickleError("it is made of more values than its pickle has bytes")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth > MAX_DEPTH:
        raise UnusualPickleError("its parts contain each other in a cycle")
    items: Any = value.items if type(value) is Made and value.of == ORDERED_DICT else value
    if type(items) is dict and not any(type(key) is Made for key in items):
        return {_plain(key, budget, depth + 1): _plain(inner, budget, depth + 1) for key, inner in items.items()}
    if isinstance(items, list | tuple) and type(items) in (list, tuple):
        return type(items)(_plain(inner, budget, depth + 1) for inner in items)
    raise UnusualPickleError("it holds a value of an unknown type")


def _leaves(value: object, path: KeyPath) -> Iterator[tuple[KeyPath, object]]:
    items = value if type(value) is dict else value.items if type(value) is Made and value.of == ORDERED_DICT else None
    if items is None or len(path) > MAX_DEPTH:
        yield path, value
        return
    for key, inner in items.items():
        yield path, None  # so that dicts of dicts count
        if type(key) is not str and type(key) is not int:
            continue
        if type(inner) is list and average_above((*path, key, 0)) is not None:
            yield from (((*path, key, i), one) for i, one in enumerate(inner))
        else:
            yield from _leaves(inner, (*path, key))


def _saved(value: object) -> SavedState | None:
    if is_tensor(value):
        record = tensor_record(value)
        parts = (SavedPart(Chunk.whole(record.size), record),) if math.prod(record.size) else ()
        return SavedState(record.size, record.dtype, parts, is_sharded=False)
    # torch pickles a subclass of Tensor as _rebuild_from_type_v2(function, class, arguments, state).
    if type(value) is not Made or value.of != _FROM_TYPE or len(value.args) != 4:
        return None
    _, kind, _, state = value.args
    if type(kind) is not Name:
        raise UnusualPickleError("holds a nameless tensor")
    if kind == _SHARDED:
        return _sharded_tensor(state)
    if kind in _DTENSORS:
        return _dtensor(state)
    raise UnusualPickleError(f"holds a {kind.name} tensor")


def _sharded_tensor(state: object) -> SavedState:
    """Local shards, metadata, and more that is of use only in the job that saved it."""
    if type(state) is not tuple or len(state) < 2 or type(state[0]) is not list:
        raise UnusualPickleError("a ShardedTensor without shards and metadata")
    shape = _numbers(_fields(state[1], {_SHARDED_FACTS}).get("size"))
    parts = []
    dtype: torch.dtype | None = None
    # A rank may hold several shards of a tensor, or none.
    for shard in state[0]:
        fields = _fields(shard, {_SHARD})
        place = _fields(fields.get("metadata"), {_SHARD_PLACE})
        box = Chunk(_numbers(place.get("shard_offsets")), _numbers(place.get("shard_sizes")))
        parts.append(_part(box, shape, tensor_record(fields.get("tensor"))))
        dtype = parts[-1].record.dtype
    # Without a local shard only the metadata says the dtype.
    if dtype is None:
        dtype = _stated_dtype(state[1])
    return SavedState(shape, dtype, tuple(part for part in parts if part.box.numel), is_sharded=True)


def _stated_dtype(metadata: object) -> torch.dtype:
    from shardsmith.formats.dcp.index_pickle import DTYPES

    properties = _fields(metadata, {_SHARDED_FACTS}).get("tensor_properties")
    state = properties.state if type(properties) is Made else None
    found = state[0] if type(state) is tuple and state else None
    if type(found) is not Name or found not in DTYPES:
        raise UnusualPickleError("a ShardedTensor without a dtype")
    return DTYPES[found]


_Cut = tuple[int, int, object]
"""Of one dimension of a mesh: its size, this rank's place in it, and the placement."""


def _dtensor(state: object) -> SavedState:
    """The local tensor, and the spec that says how the mesh cuts the whole."""
    # Either __dict__ alone, or (__dict__, slots): the spec and the local tensor are slots of DTensor.
    fields = state[1] if type(state) is tuple and len(state) == 2 else state
    if type(fields) is not dict:
        raise UnusualPickleError("a DTensor without state")
    spec = _fields(fields.get("_spec"), _SPECS)
    meta = spec.get("tensor_meta")
    if type(meta) is not Made or not meta.args:
        raise UnusualPickleError("a DTensor without a shape")
    shape = _numbers(meta.args[0])
    record = tensor_record(fields.get("_local_tensor"))
    box = _local_box(shape, _fields(spec.get("mesh"), {_MESH}), spec.get("placements"))
    parts = (_part(box, shape, record),) if box.numel else ()
    return SavedState(shape, record.dtype, parts, is_sharded=True)


def _local_box(shape: Shape, mesh: dict[object, object], placements: object) -> Chunk:
    """Where the local tensor lies: each dimension of the mesh cuts what is left, as ``torch.chunk`` does.

    They do so in turn, but for strided ones, which come after all later dimensions that cut the same one of the tensor.
    """
    sizes, place = _mesh_sizes(mesh), _numbers(mesh.get("_coordinate_on_dim"))
    if type(placements) is not tuple or not len(sizes) == len(place) == len(placements):
        raise UnusualPickleError("a DTensor whose placements do not fit its mesh")
    offsets, extents = [0] * len(shape), list(shape)
    # A replicated dimension of the mesh cuts nothing: each of its ranks has the same box.
    cuts = [cut for cut in zip(sizes, place, placements, strict=True) if not _is_a(cut[2], _REPLICATED)]
    for count, index, placement in _in_order(cuts):
        dim = _fields(placement, _SPLIT | _STRIDED).get("dim")
        if type(dim) is not int or not 0 <= dim < len(shape) or not 0 <= index < count:
            raise UnusualPickleError("a DTensor that is cut along a dimension that it does not have")
        # torch.chunk: parts of equal size, rounded up; the last ones may be short or empty.
        step = -(-extents[dim] // count)
        start = min(index * step, extents[dim])
        offsets[dim] += start
        extents[dim] = min(step, extents[dim] - start)
    return Chunk(tuple(offsets), tuple(extents))


def _is_a(value: object, kinds: set[Name]) -> bool:
    return type(value) is Made and value.of in kinds


def _in_order(cuts: list[_Cut]) -> list[_Cut]:
    """The cuts in the order in which they were made: a strided one comes first in the mesh, and last here.

    Raises UnusualPickleError for other strides than those of FSDP2 around tensor parallel.
    """
    if not any(_is_a(placement, _STRIDED) for _, _, placement in cuts):
        return cuts
    fields = _fields(cuts[0][2], _STRIDED)
    # FSDP2 shards what tensor parallel has left, so its cut comes last although its mesh dimension comes first;
    # split_factor is how many parts the later ones make.
    later = [count for count, _, placement in cuts[1:] if _fields(placement, _SPLIT).get("dim") == fields.get("dim")]
    if fields.get("split_factor") != math.prod(later):
        raise UnusualPickleError("a DTensor that is cut in strides in another way than FSDP2 cuts it")
    return [*cuts[1:], cuts[0]]


def _mesh_sizes(mesh: dict[object, object]) -> Shape:
    """Older torch pickled the mesh as a tensor of ranks, newer ones its layout."""
    if is_tensor(mesh.get("mesh")):
        return tensor_record(mesh["mesh"]).size
    layout = mesh.get("_layout")
    fields = layout.state if type(layout) is Made else None
    if type(fields) is dict and type(axes := fields.get("axes")) is tuple:
        return tuple(math.prod(_numbers(_fields(axis, _LAYOUTS).get("shape"))) for axis in axes)
    return _numbers(fields.get("shape") if type(fields) is dict else None)


def _part(box: Chunk, shape: Shape, record: TensorRecord) -> SavedPart:
    inside = len(box.offsets) == len(box.sizes) == len(shape) and all(
        start + size <= extent for start, size, extent in zip(box.offsets, box.sizes, shape, strict=True)
    )
    if not inside or record.size != box.sizes:
        raise UnusualPickleError(f"a part of shape {record.size} that is said to be {box} of {shape}")
    return SavedPart(box, record)


def _fields(value: object, kinds: set[Name]) -> dict[object, object]:
    """The attributes of an object: those of its __dict__, or of its slots."""
    state = value.state if type(value) is Made and value.of in kinds else None
    # pickle writes (__dict__ or None, slots) for a class with __slots__.
    if type(state) is tuple and len(state) == 2 and type(state[1]) is dict:
        state = state[1]
    if type(state) is not dict:
        raise UnusualPickleError(f"expected {' or '.join(sorted(kind.name for kind in kinds))}")
    return dict(state)


def _numbers(value: object) -> Shape:
    if type(value) is Made and value.of == _SIZE and len(value.args) == 1:
        value = value.args[0]
    if type(value) is not tuple and type(value) is not list:
        raise UnusualPickleError("numbers are not where they should be")
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in value):
        raise UnusualPickleError("expected numbers, found something else")
    return tuple(value)
