"""Recognises what has been done to a tensor that is not the reference's: the same rows elsewhere, or nothing in common.

Works on values that were rounded or trained a little, too: rows are matched by their direction, not by their bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shardsmith.compare.values import TensorComparison, scan_source
from shardsmith.tensors.tensors import Chunk, TensorSource, read_into, read_tensor

# Rows of a tensor that are looked up among all rows of the reference.
_SAMPLED_ROWS = 64
# Of the reference at a time: 16 MiB in float32.
_BLOCK_ELEMENTS = 1 << 22
# Of a tensor that is sorted as a whole: 256 MiB in float32, for each of the two.
_SORTED_ELEMENTS = 1 << 26
# Cosine from which two rows are one, rounded or trained a little.
_SAME_DIRECTION = 0.95
# Cosine of two tensors above which nothing can have moved.
_RELATED = 0.9
# Cosine of two tensors below which they have nothing in common: that of random ones is about 1 / sqrt(elements).
_UNRELATED = 0.2
# In a trained tensor of fewer elements, training may have turned it anywhere.
_FEW = 256
# A shorter row is like some other one by chance.
_SHORTEST_ROW = 8
# Moving values about does not change the length of a tensor; this is for rounding and a little training.
_SIMILAR_LENGTHS = 0.05
# Names of queries and keys, the only ones whose rows depend on the kind of RoPE.
QUERY_KEY = re.compile(r"(^|[._])(q_proj|k_proj|q_norm|k_norm|wq|wk|query|key|q_lin|k_lin)([._]|$)")
QK_NORM = re.compile(r"(^|[._])(q_norm|k_norm|q_layernorm|k_layernorm|query_norm|key_norm)([._]|$)")


@dataclass(frozen=True, slots=True)
class Reordering:
    """The values are those of the reference in another order."""

    rows: bool
    """Whether whole rows have moved."""
    described: str


def unrelated(comparison: TensorComparison, *, trained: bool = False) -> bool:
    """Return whether two tensors have no more in common than random ones. Never where one is zero everywhere.

    Args:
        comparison: The two tensors, compared.
        trained: Training has been at it, which can turn a small tensor into any other.
    """
    distance, spec = comparison.distance, comparison.left
    if distance is None or spec.numel < 2 or (trained and (len(spec.shape) < 2 or spec.numel < _FEW)):
        return False
    return abs(distance.cosine) < _UNRELATED


def is_all(comparison: TensorComparison, value: float) -> bool:
    """Return whether every element of the left tensor is this one, and not so in the reference."""
    extremes = comparison.extremes
    return not comparison.equal and comparison.left.numel > 1 and extremes.constant and extremes.least == value


def find_reordering(left: TensorSource, right: TensorSource, comparison: TensorComparison) -> Reordering | None:
    """How the values of a tensor have moved about, if that is all that happened to it."""
    shape, distance = comparison.left.shape, comparison.distance
    if distance is None or abs(distance.lengths - 1) > _SIMILAR_LENGTHS:
        return None
    # It points where the reference does, so nothing has moved. A vector of norms does so in any order.
    if len(shape) > 1 and distance.cosine > _RELATED:
        return None
    if len(shape) > 1 and shape[0] > 1 and math.prod(shape[1:]) >= _SHORTEST_ROW:
        moves = list(_moved_rows(left, right, comparison.name))
        if moves:
            return Reordering(True, _describe(moves))
    if comparison.left.numel <= _SORTED_ELEMENTS and _same_values(left, right, comparison):
        return Reordering(False, "the same values in another order")
    return None


def _moved_rows(left: TensorSource, right: TensorSource, name: str) -> Iterator[tuple[int, int]]:
    """Row here -> row of the reference, for some rows, if most of them lie elsewhere; nothing otherwise."""
    # Spread over the whole tensor, the last row included.
    rows = left.specs[name].shape[0]
    chosen = torch.linspace(0, rows - 1, min(rows, _SAMPLED_ROWS), device="cpu").long().unique()
    sample = torch.stack([_unit(_rows(left, name, int(row), 1))[0] for row in chosen])
    best, place = _nearest(sample, right, name)
    # Rows of zeros, such as those of padding tokens, are like no other and prove nothing.
    real = sample.isfinite().all(1) & sample.any(1)
    found = real & (best > _SAME_DIRECTION)
    # Rows that a model has twice are found at the first of them: the row's own place must be less good.
    there = torch.stack([_unit(_rows(right, name, int(row), 1))[0] for row in chosen])
    elsewhere = found & (place != chosen) & ((sample * there).sum(1) < best - 0.01)
    if int(elsewhere.sum()) * 2 > int(real.sum()) > 1:
        yield from zip(chosen[elsewhere].tolist(), place[elsewhere].tolist(), strict=True)


def _nearest(sample: Tensor, source: TensorSource, name: str) -> tuple[Tensor, Tensor]:
    """For each row of the sample the greatest cosine with any row of a tensor, and where that is."""
    rows = source.specs[name].shape[0]
    step = max(1, _BLOCK_ELEMENTS // sample.shape[1])
    best, place = (
        # Less than any cosine.
        torch.full((len(sample),), -2.0, device="cpu"),
        torch.zeros(len(sample), dtype=torch.int64, device="cpu"),
    )
    for start in range(0, rows, step):
        cosines = sample @ _unit(_rows(source, name, start, min(step, rows - start))).T
        # A row that is not finite is nobody's.
        value, index = cosines.nan_to_num(-2.0).max(1)
        place = torch.where(value > best, index + start, place)
        best = torch.maximum(best, value)
    return best, place


def _rows(source: TensorSource, name: str, start: int, count: int) -> Tensor:
    """Some rows as float32 [count, everything else]."""
    spec = source.specs[name]
    tail = spec.shape[1:]
    box = Chunk((start, *(0 for _ in tail)), (count, *tail))
    return read_into(source, name, box, torch.empty(box.sizes, device="cpu")).reshape(count, -1)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _same_values(left: TensorSource, right: TensorSource, comparison: TensorComparison) -> bool:
    # In the narrower dtype of the two, so that rounding makes no difference of order or value.
    dtype = min(comparison.left.dtype, comparison.right.dtype, key=lambda kind: kind.itemsize)
    if not dtype.is_floating_point:
        return False
    if not _same_extremes(left, right, comparison.name, dtype):
        return False  # sorting takes a hundred times as long
    a, b = (
        read_tensor(source, comparison.name).to(dtype).float().reshape(-1).sort().values for source in (left, right)
    )
    # Tensors of one value everywhere are equal in any order.
    return torch.equal(a, b) and bool(a[0] != a[-1])


def _same_extremes(left: TensorSource, right: TensorSource, name: str, dtype: torch.dtype) -> bool:
    mine, other = (scan_source(source, [name])[name] for source in (left, right))
    ends = torch.tensor([[mine.least, mine.greatest], [other.least, other.greatest]], device="cpu").to(dtype)
    return torch.equal(ends[0], ends[1])


def _describe(moves: list[tuple[int, int]]) -> str:
    shifts = {place - row for row, place in moves}
    if len(shifts) == 1:
        return f"every row is row i{shifts.pop():+d} of the model"
    row, place = moves[0]
    return f"rows are in another order: row {row} here is row {place} of the model"
