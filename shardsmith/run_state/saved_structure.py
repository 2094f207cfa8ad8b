"""The structure of what users save beside the model: that of the checkpoint, not that of an object just made.

A loader's state or a table of metrics has other keys in mid-run than at its start. torch loads into the keys that the
fresh state has, and silently leaves out the others; here they are added before the load.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element

from shardsmith.errors import UsageError
from shardsmith.formats.dcp.index import DcpIndex
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.ground.layout import DCP_INDEX_FILE
from shardsmith.tensors.checkpoint_keys import KeyPath

INT_KEYS = "int_keys"
"""Key in ``train_state`` of the paths at which mappings had whole numbers as keys. Only where there are any."""


def with_text_keys(value: Any, path: str, numbered: list[str]) -> Any:
    """Return a nested state whose mappings have strings as keys, as torch saves them.

    Args:
        value: Any part of the state.
        path: Where it lies in the whole.
        numbered: Gets the paths of the mappings that had whole numbers.

    Raises:
        UsageError: a key is neither a string nor a whole number, or two keys would be one.
    """
    if isinstance(value, Mapping):
        if any(type(name) is int for name in value):
            numbered.append(path)
        others = [name for name in value if type(name) is not int and not isinstance(name, str)]
        if others or len({str(name) for name in value}) < len(value):
            raise UsageError(f"{path}: keys of what is saved are strings or whole numbers, and each is there once")
        parts = {str(name): with_text_keys(one, f"{path}.{name}", numbered) for name, one in value.items()}
        return value if all(parts.get(name) is one for name, one in value.items()) else _like(value, parts)
    if isinstance(value, list):
        # Unchanged parts stay the same objects, and no copy of a large state is made.
        items = [with_text_keys(one, f"{path}.{i}", numbered) for i, one in enumerate(value)]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return value


def with_number_keys(value: Any, path: str, numbered: Collection[str]) -> Any:
    """Inverse of ``with_text_keys``. Changes ``value`` in place, and returns it."""
    if isinstance(value, dict):
        parts = {name: with_number_keys(one, f"{path}.{name}", numbered) for name, one in value.items()}
        # In place, so that it stays a mapping of its kind.
        value.clear()
        value.update({_number(name): one for name, one in parts.items()} if path in numbered else parts)
    if isinstance(value, list):
        value[:] = [with_number_keys(one, f"{path}.{i}", numbered) for i, one in enumerate(value)]
    return value


def _number(name: str) -> str | int:
    return int(name) if name.removeprefix("-").isdecimal() else name


def _like(mapping: Mapping[Any, Any], parts: Mapping[str, Any]) -> Mapping[Any, Any]:
    """The parts in a mapping of the same kind, such as a Counter or a defaultdict; a dict for what is no dict."""
    if not isinstance(mapping, dict):
        return dict(parts)
    # By a copy: it keeps what the kind was made with, such as the factory of a defaultdict.
    copied = mapping.copy()
    copied.clear()
    for name, one in parts.items():
        copied[name] = one
    return copied


def with_saved_structure(
    target: Mapping[str, Any], checkpoint: Path, keys: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return a state to be filled that has, below some top-level keys, all that a checkpoint has there.

    Reads the checkpoint; no communication. Tensors of ``target`` that fit stay, and are filled in place. What only
    ``target`` has stays, too, for the load to refuse it. Of a checkpoint that is no DCP directory: ``target`` as it is.

    Returns:
        That state, and the paths for ``with_number_keys`` when it is filled.
    """
    numbered: list[str] = []
    wanted = [key for key in keys if key in target]
    if not wanted or not (checkpoint / DCP_INDEX_FILE).exists():
        return dict(target), numbered
    fresh = {key: _copied(with_text_keys(target[key], key, numbered)) for key in wanted}
    with contextlib.closing(DcpSource(checkpoint, to_load=True)) as source:
        if (name := f"train_state.{INT_KEYS}") in source.index.objects:
            numbered += source.read_object(name)
        return {**target, **{key: _structured(key, fresh[key], source.index) for key in wanted}}, numbered


def _structured(key: str, fresh: Any, index: DcpIndex) -> Any:
    flat, paths = flatten_state_dict({key: fresh})
    leaves = {tuple(paths[name]): value for name, value in flat.items()}
    root = {key: fresh}
    for name, path in index.below(key):
        _make_way(root, path, leaves)
        # What the fresh state lacks is added, and what it has in another shape is replaced.
        set_element(root, path, _place(leaves.get(path), name, index))
    return root[key]


def _copied(value: Any) -> Any:
    """The containers anew, of the same kind; what they hold is the same."""
    if isinstance(value, Mapping):
        return _like(value, {name: _copied(one) for name, one in value.items()})
    return [_copied(one) for one in value] if isinstance(value, list) else value


def _make_way(root: dict[str, Any], path: KeyPath, leaves: dict[KeyPath, Any]) -> None:
    """Put a container where the fresh state has something else, and the saved one has more below."""
    for end in range(1, len(path)):
        if path[:end] in leaves:
            del leaves[path[:end]]
            # A number in a path is a place in a list.
            set_element(root, path[:end], [] if isinstance(path[end], int) else {})


def _place(fresh: Any, name: str, index: DcpIndex) -> Any:
    """What is to be filled: the fresh tensor where it fits or is sharded, else a new one; None for an object."""
    entry = index.tensors.get(name)
    if entry is None:
        return None
    if isinstance(fresh, Tensor) and (type(fresh) is not Tensor or tuple(fresh.shape) == entry.spec.shape):
        return fresh
    return torch.empty(entry.spec.shape, dtype=entry.spec.dtype, device="cpu")
