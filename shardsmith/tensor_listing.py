"""The tensors of a checkpoint, one by one: names, shapes, dtypes and, if they are read, statistics."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import AnyPath
from shardsmith.errors import CheckpointNotFoundError
from shardsmith.formats.by_path import model_names, open_source
from shardsmith.ground.progress import advance
from shardsmith.ground.remote_path import as_path
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.tensors import Chunk, TensorSource

_BLOCK = 1 << 22
"""Elements that are cast to float64 at once."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of the finite elements of a tensor; of complex ones their absolute values."""

    minimum: float
    maximum: float
    mean: float
    std: float
    """Population standard deviation."""
    not_finite: int
    """Elements that are NaN or infinite."""
    zeros: int


@dataclass(frozen=True, slots=True)
class ListedTensor:
    """One tensor of a model in a checkpoint."""

    model: str
    """``main``, ``ema``, or ``ema:NAME``."""
    name: str
    shape: tuple[int, ...]
    """Global shape."""
    dtype: str
    nbytes: int
    tied_to: str | None
    """The tensor that it is, if it has no bytes of its own."""
    statistics: Statistics | None


@checked
def list_tensors(path: AnyPath, patterns: Sequence[str] = (), *, statistics: bool = False) -> list[ListedTensor]:
    """List the tensors of all models in a checkpoint, in file order. No communication.

    Args:
        path: Anything that ``detect_checkpoint_format`` knows.
        patterns: Names to list, such as ``"*.norm.weight"``; all without any.
        statistics: Also read the tensors, a block of 32 MB (float64) at a time.

    Raises:
        CheckpointNotFoundError: there is no checkpoint, or no name matches.
        CheckpointError: it is half-written or damaged.
    """
    path = as_path(path)
    found = [
        tensor for model in model_names(path) for tensor in _of_model(path, model, patterns, statistics=statistics)
    ]
    if not found:
        # A pattern that fits nothing is more likely a mistake than a wish for an empty list.
        raise CheckpointNotFoundError(path, f"holds no tensor whose name matches {' or '.join(patterns) or '*'}")
    return found


def _of_model(path: Path, model: str, patterns: Sequence[str], *, statistics: bool) -> Iterator[ListedTensor]:
    source = open_source(path, model)
    try:
        for name, spec in source.specs.items():
            if _matches(name, patterns):
                values = _statistics(source, name) if statistics else None
                yield ListedTensor(model, name, spec.shape, dtype_name(spec.dtype), spec.nbytes, None, values)
        # Aliases last: they have no bytes, and refer to a row above.
        for alias, kept in source.aliases.items():
            if _matches(alias, patterns):
                spec = source.specs[kept]
                yield ListedTensor(model, alias, spec.shape, dtype_name(spec.dtype), 0, kept, None)
    finally:
        source.close()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _statistics(source: TensorSource, name: str) -> Statistics | None:
    """None for a tensor without elements."""
    spec = source.specs[name]
    count, zeros, not_finite, low, high = 0, 0, 0, math.inf, -math.inf
    origin: float | None = None  # sums of differences from one of the elements lose no digits to a large mean
    total = squares = 0.0
    # In stored pieces, whatever their order: no statistic here depends on it.
    for _, piece in source.pieces(name, Chunk.whole(spec.shape)):
        for values in _blocks(piece):
            advance(values.numel() * spec.dtype.itemsize)
            # NaN would spread to every sum; the others count by themselves.
            finite = values[torch.isfinite(values)]
            not_finite += values.numel() - finite.numel()
            if not finite.numel():
                continue
            zeros += int((finite == 0).sum())
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            origin = float(finite[0]) if origin is None else origin
            finite = finite - origin
            total, squares = total + float(finite.sum()), squares + float(finite.square().sum())
            count += finite.numel()
    if not count:
        # Without a finite element there is nothing to say but how many are not.
        return Statistics(math.nan, math.nan, math.nan, math.nan, not_finite, zeros) if not_finite else None
    mean = total / count
    # Never below 0: rounding may make it so for values that are all equal.
    spread = math.sqrt(max(0.0, squares / count - mean * mean))
    return Statistics(low, high, (origin or 0.0) + mean, spread, not_finite, zeros)


def _blocks(piece: Tensor) -> Iterator[Tensor]:
    """The elements as float64, shape (B,)."""
    for block in piece.reshape(-1).split(_BLOCK):
        if block.is_complex():
            yield block.abs().double()
        else:
            # 8-bit floats by way of float32, which holds all of them exactly.
            yield (block.float() if block.is_floating_point() and block.dtype.itemsize == 1 else block).double()
