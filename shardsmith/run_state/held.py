"""What one rank holds of a nested state dict: its keys in order, and of each tensor the boxes with their values."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress, groupby
from operator import attrgetter
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors as flatten_sharded_tensors
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from shardsmith.errors import UsageError
from shardsmith.sharding.local_boxes import local_boxes
from shardsmith.tensors.checkpoint_keys import KeyPath
from shardsmith.tensors.tensors import Chunk, Shape

_PLAIN = frozenset({int, float, bool, str, bytes, complex, tuple, type(None)})
_WHOLE = frozenset({Tensor, nn.Parameter})
_DENSE = _WHOLE | {DTensor}
_LEAVES = _PLAIN | _DENSE
_OF_SHARDED = attrgetter("_spec", "_local_tensor.dtype")  # in the first are shape, mesh and placements
_OF_WHOLE = attrgetter("shape", "dtype", "layout", "is_nested")
_SHAPE = attrgetter("shape")


class Entry(NamedTuple):
    """One key of a state dict as one rank has it, without its values: equal as long as nobody shards it anew."""

    key: str
    path: KeyPath
    """Where it lies in the nested state dict."""
    shape: Shape | None
    """Global shape; None for a value that is no tensor."""
    dtype: torch.dtype | None
    boxes: tuple[Chunk, ...]
    """Those of this rank, in the order of its values. Of a tensor without elements the one box that there is."""


@dataclass(frozen=True, slots=True)
class Held:
    """A state dict of one rank, flattened as torch.distributed.checkpoint does it."""

    entries: list[Entry]
    leaves: list[Any]
    """By entry: the tensor of the state dict, or the value that is no tensor."""

    @torch.no_grad()
    def tensors(self, boxes: Sequence[tuple[int, int, Chunk | None]], sizes: Sequence[Shape]) -> list[Tensor]:
        """Return values of boxes. No communication; shares memory.

        Args:
            boxes: Of each the entry, its position in the values of that, and which part of it; None is all.
            sizes: Their shapes.
        """
        leaves = [self.leaves[i] for i, _, _ in boxes]
        if not _DENSE.issuperset(map(type, leaves)):
            return [self._box(*box) for box in boxes]
        found = [leaf._local_tensor if type(leaf) is DTensor else leaf for leaf in leaves]
        if [*map(_SHAPE, found)] == sizes:
            return found  # the usual case, without finding each box again
        every = zip(found, sizes, boxes, strict=True)
        return [values if values.shape == size else self._box(*box) for values, size, box in every]

    def _box(self, i: int, position: int, part: Chunk | None) -> Tensor:
        values = self.values(i)[position]
        return values if part is None else values[part.within(Chunk.whole(part.sizes))]

    def values(self, i: int) -> list[Tensor]:
        """Return the values of each box of an entry. Call it without grad. No communication; shares memory."""
        entry, tensor = self.entries[i], self.leaves[i]
        if entry.shape and 0 in entry.shape:
            return [torch.empty(entry.shape, dtype=entry.dtype, device="cpu")]
        return [values for _, values in local_boxes(tensor)]


class KnownEntries:
    """Flattens one state after another, and makes entries only where a state is not like the one before.

    An entry follows from the place of a value in the state and from its type, shape, dtype and placements, which are
    read at every call. No value is kept, so it makes no difference whether a tensor is the same object as last time.
    """

    def __init__(self) -> None:
        self._parts: dict[Any, _Part] = {}
        self._entries: list[Entry] = []

    @torch.no_grad()
    def hold(self, state_dict: Mapping[str, Any]) -> Held:
        """Flatten a state dict and find this rank's boxes. No communication; shares memory.

        Raises:
            UsageError: naming all tensors that are not dense.
        """
        leaves, parts, opaque = list[Any](), dict[Any, _Part](), dict[str, str]()
        for name, state in _parts_of(state_dict):
            part = self._parts.get(name)
            found = part.leaves_of(state) if part is not None else None
            if part is None or found is None:
                part, found = _Part.of(state, opaque)
            parts[name] = part
            leaves.extend(found)
        _refuse_opaque(opaque)
        if [*map(id, parts.values())] != [*map(id, self._parts.values())]:
            entries = [*chain.from_iterable(part.entries for part in parts.values())]
            if entries != self._entries:
                _refuse_duplicates(entries)
                self._entries = entries
            self._parts = parts
        return Held(self._entries, leaves)


def _parts_of(state_dict: Mapping[str, Any]) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Yield parts of a state that are looked at by themselves, each with the first of its keys.

    One is a mapping in the state, or leaves beside each other, such as the weights of a model.
    """
    for are_leaves, run in groupby(state_dict.items(), lambda item: type(item[1]) in _LEAVES):
        if are_leaves:
            state = dict(run)
            yield next(iter(state)), state
        else:
            yield from ((name, {name: value}) for name, value in run)


@dataclass(frozen=True, slots=True)
class _Part:
    """What was found of a part of a state."""

    keys: list[Any]
    """Those of the leaves, or of what is there in their place."""
    entries: list[Entry]
    facts: _Facts | None
    """Of the leaves; None, and they are found anew each time, if some are nested deeper, or of a rare kind."""

    @classmethod
    def of(cls, state: Mapping[str, Any], opaque: dict[str, str]) -> tuple[Self, list[Any]]:
        """From a part; with its leaves. What cannot be saved is added to ``opaque``: key and kind."""
        flat, paths = _flatten(state)
        if any(isinstance(leaf, ShardedTensor) for leaf in flat.values()):
            flat = flatten_sharded_tensors(flat)  # of FSDP1 with tensor parallelism the shards are sharded themselves
        opaque |= {key: kind for key, leaf in flat.items() if (kind := _kind(leaf)) is not None}
        dense = {key: leaf for key, leaf in flat.items() if key not in opaque}
        entries = [_entry(key, tuple(paths[key]), leaf) for key, leaf in dense.items()]
        leaves = [*dense.values()]
        keys, inner = _shallow(state)
        is_shallow = [*map(id, inner)] == [*map(id, leaves)]
        return cls(keys, entries, _Facts.of(leaves) if is_shallow else None), leaves

    def leaves_of(self, state: Mapping[str, Any]) -> list[Any] | None:
        """The leaves of the part that is there now; None if they do not have these entries, or may not."""
        if self.facts is None:
            return None
        keys, leaves = _shallow(state)
        return leaves if keys == self.keys and self.facts.fit(leaves) else None


def _shallow(state: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Keys and values of a part, or of the one mapping in it."""
    first = next(iter(state.values()))
    inside = first if isinstance(first, Mapping) else state
    return [inside is state, *inside], [*inside.values()]


class _Facts:
    """All that the entries of leaves follow from, but their places.

    In lists that are made and compared without a step of Python for each leaf, since there may be 100,000.
    """

    def __init__(self, types: list[type], leaves: list[Any]) -> None:
        self._types = types
        self._is_sharded = [kind is DTensor for kind in types]
        self._is_whole = [kind in _WHOLE for kind in types]
        self._seen = self._look(leaves)

    @classmethod
    def of(cls, leaves: list[Any]) -> Self | None:
        """None if there are kinds of tensors among them of which more may have to be known."""
        types = [*map(type, leaves)]
        return cls(types, leaves) if _LEAVES.issuperset(types) else None

    def fit(self, leaves: list[Any]) -> bool:
        """Whether the same entries follow from these."""
        return [*map(type, leaves)] == self._types and self._look(leaves) == self._seen

    def _look(self, leaves: list[Any]) -> list[Any]:
        sharded, whole = compress(leaves, self._is_sharded), compress(leaves, self._is_whole)
        return [*map(_OF_SHARDED, sharded), *map(_OF_WHOLE, whole)]


def _flatten(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Sequence[Any]]]:
    """Values by flat key, and the path of each, as ``flatten_state_dict`` of torch: it does what is nested deeper."""
    flat: dict[str, Any] = {}
    paths: dict[str, Sequence[Any]] = {}

    def add(key: str, path: Sequence[Any], value: Any) -> None:
        if key in flat:
            raise ValueError(f"duplicated flatten key {key}")
        flat[key], paths[key] = value, path

    for name, part in state_dict.items():
        is_flat = isinstance(part, Mapping) and all(isinstance(inner, str) for inner in part)
        for inner, value in part.items() if is_flat else (("", part),):
            if type(value) in _LEAVES:
                path = (str(name), inner) if is_flat else (str(name),)
                add(".".join(path), path, value)
                continue
            nested, where = flatten_state_dict({name: {inner: value} if is_flat else value})
            for key, one in nested.items():
                add(key, where[key], one)
    return flat, paths


def items(entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
    """Yield what can be written by one rank alone: entry and position in its values, in order."""
    for i, entry in enumerate(entries):
        for position in range(1 if entry.shape is None else len(entry.boxes)):
            yield i, position


def _entry(key: str, path: KeyPath, leaf: Any) -> Entry:
    if not isinstance(leaf, Tensor):
        return Entry(key, path, None, None, ())
    shape = tuple(leaf.shape)
    boxes = (Chunk.whole(shape),) if 0 in shape else tuple(box for box, _ in local_boxes(leaf))
    return Entry(key, path, shape, leaf.dtype, boxes)


def _refuse_opaque(opaque: Mapping[str, str]) -> None:
    """Raise on tensors whose bytes alone are not their values, but those with scales or indices."""
    if opaque:
        advice = "Keep their parts (values, scales, indices) in the state as tensors of their own."
        if any("Partial" in kind for kind in opaque.values()):
            advice += " Of a partial tensor save the sum: tensor.redistribute(placements=[Replicate()])."
        lines = "\n  ".join(f"{key}: {kind}" for key, kind in opaque.items())
        raise UsageError(f"only dense tensors can be saved; nothing was written\n  {lines}\n{advice}")


def _refuse_duplicates(entries: Sequence[Entry]) -> None:
    if len({entry.key for entry in entries}) < len(entries):
        counts = Counter(entry.key for entry in entries)
        raise ValueError(f"duplicated flatten key {', '.join(key for key, count in counts.items() if count > 1)}")


def _kind(tensor: Any) -> str | None:
    if not isinstance(tensor, Tensor) or isinstance(tensor, ShardedTensor):
        return None
    if isinstance(tensor, DTensor):
        return _kind_of_placements(tensor.placements)
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_quantized:
        return f"a quantized tensor ({tensor.qscheme()})"
    return None if tensor.layout is torch.strided else str(tensor.layout)


@functools.lru_cache(maxsize=4096)
def _kind_of_placements(placements: tuple[Placement, ...]) -> str | None:
    return f"a DTensor of which ranks hold addends: {placements}" if any(p.is_partial() for p in placements) else None
