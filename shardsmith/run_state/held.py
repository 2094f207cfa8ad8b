"""What one rank holds of a nested state dict: its keys in order, and of each tensor the boxes with their values."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors as flatten_sharded_tensors
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from shardsmith.errors import UsageError
from shardsmith.sharding.local_boxes import local, local_boxes
from shardsmith.tensors.checkpoint_keys import KeyPath
from shardsmith.tensors.tensors import Chunk, Shape

_PLAIN = frozenset({int, float, bool, str, bytes, complex, tuple, type(None)})
_WHOLE = frozenset({Tensor, nn.Parameter})
_LEAVES = _PLAIN | _WHOLE | {DTensor}


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

    def values(self, i: int) -> list[Tensor]:
        """Return the values of each box of an entry. Call it without grad. No communication; shares memory."""
        entry, tensor = self.entries[i], self.leaves[i]
        if entry.shape and 0 in entry.shape:
            return [torch.empty(entry.shape, dtype=entry.dtype, device="cpu")]
        if len(entry.boxes) == 1 and not isinstance(tensor, ShardedTensor):
            whole = local(tensor) if isinstance(tensor, DTensor) else tensor.detach()
            if whole.shape == entry.boxes[0].sizes:
                return [whole]  # the usual case, without finding the box again
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
        held, parts, opaque = Held([], []), dict[Any, _Part](), dict[str, str]()
        for name, value in state_dict.items():
            part = self._parts.get(name)
            leaves = part.leaves_of(value) if part is not None else None
            if part is None or leaves is None:
                part, leaves = _Part.of(name, value, opaque)
            parts[name] = part
            held.entries.extend(part.entries)
            held.leaves.extend(leaves)
        _refuse_opaque(opaque)
        if held.entries != self._entries:
            _refuse_duplicates(held.entries)
        self._parts, self._entries = parts, held.entries
        return held


@dataclass(frozen=True, slots=True)
class _Part:
    """What was found under one key of a state dict."""

    keys: list[Any] | None
    """Those of a dict of leaves; None where the value is a leaf itself."""
    entries: list[Entry]
    facts: list[_Facts | None] | None
    """By entry, None of what is no tensor; or None, and it is found anew each time, if leaves are nested deeper."""

    @classmethod
    def of(cls, name: Any, value: Any, opaque: dict[str, str]) -> tuple[Self, list[Any]]:
        """From a value; with its leaves. What cannot be saved is added to ``opaque``: key and kind."""
        flat, paths = _flatten({name: value})
        if any(isinstance(leaf, ShardedTensor) for leaf in flat.values()):
            flat = flatten_sharded_tensors(flat)  # of FSDP1 with tensor parallelism the shards are sharded themselves
        opaque |= {key: kind for key, leaf in flat.items() if (kind := _kind(leaf)) is not None}
        dense = {key: leaf for key, leaf in flat.items() if key not in opaque}
        entries = [_entry(key, tuple(paths[key]), leaf) for key, leaf in dense.items()]
        leaves = [*dense.values()]
        inner = [value] if type(value) in _LEAVES else [*value.values()] if isinstance(value, Mapping) else []
        is_shallow = [*map(id, inner)] == [*map(id, leaves)]
        keys = [*value] if isinstance(value, Mapping) else None
        return cls(keys, entries, [*map(_facts, leaves)] if is_shallow else None), leaves

    def leaves_of(self, value: Any) -> list[Any] | None:
        """The leaves of the value that is there now; None if they do not have these entries, or may not."""
        is_leaf = type(value) in _LEAVES
        keys = None if is_leaf or not isinstance(value, Mapping) else [*value]
        if self.facts is None or keys != self.keys or (keys is None and not is_leaf):
            return None
        leaves = [value] if keys is None else [*value.values()]
        for leaf, facts in zip(leaves, self.facts, strict=True):
            if type(leaf) not in _PLAIN if facts is None else _facts(leaf) != facts:
                return None
        return leaves


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


_Facts = tuple[torch.Size, torch.dtype, DeviceMesh | None, tuple[Placement, ...]]
"""All that the entry of a tensor follows from, but its place; the mesh is None where it is whole on every rank."""


def _facts(leaf: Any) -> _Facts | None:
    """None for what is no tensor, and for kinds of tensors of which more may have to be known."""
    if type(leaf) is DTensor:
        return leaf.shape, leaf.dtype, leaf.device_mesh, leaf.placements
    if type(leaf) in _WHOLE and not leaf.is_nested and leaf.layout is torch.strided:
        return leaf.shape, leaf.dtype, None, ()
    return None


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
