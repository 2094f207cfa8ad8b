"""What one rank holds of a nested state dict: its keys in order, and of each tensor the boxes with their values."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
_LEAVES = _PLAIN | {Tensor, nn.Parameter, DTensor}


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
    values: list[list[Any]]
    """By entry: a tensor a box, which shares memory with the state dict; or the one value that is no tensor."""


@torch.no_grad()
def hold(state_dict: Mapping[str, Any]) -> Held:
    """Flatten a state dict and find this rank's boxes. No communication; shares memory.

    Raises:
        UsageError: naming all tensors that are not dense.
    """
    flat, paths = _flatten(state_dict)
    if any(isinstance(value, ShardedTensor) for value in flat.values()):
        flat = flatten_sharded_tensors(flat)  # of FSDP1 with tensor parallelism the shards are sharded themselves
    _refuse_opaque(flat)
    held = Held([], [])
    for key, value in flat.items():
        if type(value) in _PLAIN or not isinstance(value, Tensor):  # of an optimizer's options there are thousands
            held.entries.append(Entry(key, tuple(paths[key]), None, None, ()))
            held.values.append([value])
        else:
            boxes, values = _boxes(value)
            held.entries.append(Entry(key, tuple(paths[key]), tuple(value.shape), value.dtype, boxes))
            held.values.append(values)
    return held


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


def _boxes(value: Tensor) -> tuple[tuple[Chunk, ...], list[Any]]:
    if 0 in value.shape:
        return (Chunk.whole(tuple(value.shape)),), [torch.empty(tuple(value.shape), dtype=value.dtype, device="cpu")]
    found = local_boxes(value)
    return tuple(box for box, _ in found), [values for _, values in found]


def _refuse_opaque(flat: Mapping[str, Any]) -> None:
    """Raise on tensors whose bytes alone are not their values, but those with scales or indices."""
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    opaque = [f"{key}: {kind}" for key, tensor in tensors.items() if (kind := _kind(tensor)) is not None]
    if opaque:
        advice = "Keep their parts (values, scales, indices) in the state as tensors of their own."
        if any("Partial" in line for line in opaque):
            advice += " Of a partial tensor save the sum: tensor.redistribute(placements=[Replicate()])."
        raise UsageError("\n  ".join(["only dense tensors can be saved; nothing was written", *opaque]) + f"\n{advice}")


def _kind(tensor: Tensor) -> str | None:
    if isinstance(tensor, ShardedTensor):
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
