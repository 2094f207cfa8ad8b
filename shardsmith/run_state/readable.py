"""Values of a run's state that are no tensors: found out before a save whether a resume could read them.

A checkpoint is read without running code, so a value of a class of its own could be saved, and never be read again.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardsmith.errors import UsageError

_PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.Size, torch.device})
_USUAL = _PLAIN | {Tensor, nn.Parameter, DTensor}
_SEQUENCES = (list, tuple, set, frozenset)
_ARRAYS = "an array of numpy; return torch.from_numpy(array), or array.tolist()"
_OTHERS = "return tensors, numbers, strings, and lists and dicts of them"


def made_readable(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state in which numbers of numpy are Python's own, which are read without running code. No communication.

    A learning rate that was computed with numpy is such a number. Everything else is the same objects.

    Raises:
        UsageError: naming every value that could not be read again, and what to return in its place.
    """
    problems: list[str] = []
    readable: dict[str, Any] = _converted(state, "", problems)
    if problems:
        lines = "\n  ".join(problems)
        raise UsageError(f"values that could be saved, but never be read again\n  {lines}\nNothing was saved.")
    return readable


def _converted(value: Any, path: str, problems: list[str]) -> Any:
    """The value itself, unless a part of it had to be converted."""
    kind = type(value)
    if _is_usual(value) or isinstance(value, Tensor):
        return value
    if isinstance(value, np.generic) and type(value.item()) in _PLAIN:
        return value.item()
    if isinstance(value, Mapping):
        prefix = f"{path}." if path else ""
        rare = [name for name, one in value.items() if not _is_usual(one)]  # of an optimizer's entries hardly any
        parts = {name: _converted(value[name], f"{prefix}{name}", problems) for name in rare}
        is_same = all(part is value[name] for name, part in parts.items())
        return value if is_same else _rebuilt(value, {**value, **parts})
    if kind in _SEQUENCES:
        items = [_converted(one, f"{path}.{i}", problems) for i, one in enumerate(value)]
        return kind(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    if isinstance(value, np.ndarray):
        problems.append(f"{path}: {_ARRAYS}")
    elif (reason := _unreadable(value)) is not None:
        problems.append(f"{path}: a {kind.__name__} of {kind.__module__}, {reason}; {_OTHERS}")
    return value


def _is_usual(value: Any) -> bool:
    """Of tuples only betas and their like, of which an optimizer has one for each parameter."""
    kind = type(value)
    return kind in _USUAL or (kind is tuple and _PLAIN.issuperset(map(type, value)))


def _rebuilt(mapping: Mapping[str, Any], parts: dict[str, Any]) -> Mapping[str, Any]:
    """A mapping of the same kind, a dict for one of a rare kind."""
    return type(mapping)(parts) if isinstance(mapping, dict) and type(mapping) in (dict, OrderedDict) else parts


def _unreadable(value: Any) -> str | None:
    """Why torch would not read a value of a rare type again; None if it would."""
    # By doing it: what `weights_only` takes is known to torch alone.
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception as error:
        return f"which cannot be pickled ({type(error).__name__})"
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception:
        return "which cannot be read without running code"
    return None
