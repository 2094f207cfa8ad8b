"""Casts to a dtype of smaller range, such as float16: what is finite must not become infinite."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from shardsmith.errors import MismatchError

_OTHER_DTYPES = 'Of dtypes, bfloat16, float32 and "original" have room for what such a model has.'


def is_narrower(dtype: torch.dtype, held: torch.dtype) -> bool:
    """Whether numbers of one are far beyond the range of the other; bfloat16's is that of float32.

    Args:
        dtype: That of the cast.
        held: That of what is cast.
    """
    if not (dtype.is_floating_point and held.is_floating_point) or dtype == held:
        return False
    return torch.finfo(dtype).max < torch.finfo(held).max / 2


def largest_lost(cast: Tensor, read: Callable[[], Tensor]) -> float:
    """Return the largest absolute value that is finite, and is not so in the cast; 0.0 if there is none.

    Args:
        cast: Any shape; on the CPU.
        read: Returns what was cast, in the same shape. Called only where the cast is not finite somewhere.
    """
    if not (lost := ~_wide(cast).isfinite()).any():
        return 0.0
    held = _wide(read())
    finite = held[lost & held.isfinite()]  # what is infinite before, too, is meant
    return float(finite.abs().max()) if finite.numel() else 0.0


class LostValues:
    """What was finite and is infinite in the dtype that it was cast to, by tensor. Any thread."""

    def __init__(self) -> None:
        """None is known yet."""
        self._largest: dict[str, float] = {}
        self._adding = threading.Lock()

    def add(self, name: str, cast: Tensor, read: Callable[[], Tensor]) -> None:
        """Look at a part of a tensor, as ``largest_lost`` does."""
        most = largest_lost(cast, read)
        with self._adding:
            if most > self._largest.get(name, 0.0):
                self._largest[name] = most

    @property
    def largest(self) -> dict[str, float]:
        """Largest absolute value that was lost, by tensor; in no order."""
        return dict(self._largest)

    def refuse(self, place: str | Path, truth: str, cure: str = _OTHER_DTYPES) -> None:
        """Raise MismatchError that names all tensors, if there are any.

        Args:
            place: What is at fault.
            truth: What is true now, on disk or in the tensors that were filled.
            cure: What to do.
        """
        if self._largest:
            # Threads find them in no order.
            lines = [f"{name}: up to {most:.6g}" for name, most in sorted(self._largest.items())]
            summary = f"{len(lines)} tensors have finite values that would be infinite in the dtype that was asked for"
            raise MismatchError(place, summary, lines, f"{truth} {cure}")


def _wide(values: Tensor) -> Tensor:
    """The same where torch has operators for it, which it lacks for a byte."""
    return values.float() if values.element_size() == 1 else values
