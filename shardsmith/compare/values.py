"""Whether two sources hold the same values: streamed block by block, several tensors at a time.

Where the bytes are equal, that and the extremes are all that is worked out. Of the others it is measured how far apart
they are, and whether rounding to fewer bits explains it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from shardsmith.ground.memory import same_bits
from shardsmith.ground.progress import advance
from shardsmith.ground.threads import one_thread_per_operator
from shardsmith.tensors.narrowing import is_narrower, largest_lost
from shardsmith.tensors.tensors import Chunk, TensorSource, TensorSpec, read_into, row_major_blocks

_BLOCK_ELEMENTS = 1 << 17
"""So few that two blocks and what is computed of them stay in cache, and memory for them need not be asked for anew."""
_MOST_THREADS = 8
_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Extremes:
    """Least and greatest value of a tensor; NaN as soon as one is NaN. 0 and 0 for a tensor without elements."""

    least: float = 0.0
    greatest: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether all values are."""
        return math.isfinite(self.least) and math.isfinite(self.greatest)

    @property
    def has_nan(self) -> bool:
        """Whether one is no number."""
        return math.isnan(self.least) or math.isnan(self.greatest)

    @property
    def constant(self) -> bool:
        """Whether all values are one."""
        return self.least == self.greatest


@dataclass(frozen=True, slots=True)
class Distance:
    """How far apart two tensors are that are not equal."""

    largest: float
    """Of the differences of two elements, the largest; infinite where only one of them is a number."""
    cosine: float
    """Of the angle between the two: 1 where they point in one direction, about 0 where they have nothing in common, NaN
    where one is zero everywhere."""
    lengths: float
    """Length of the left one divided by that of the right one, both taken as vectors."""
    differing: int
    """Elements that differ."""
    rounding: torch.dtype | None
    """Rounded to this dtype both are equal; None where they are not."""
    relative: float
    """Length of the difference divided by the length of the right one, both taken as vectors; infinite where one of two
    elements alone is a number, or the right one is zero everywhere."""


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """What became of one tensor."""

    name: str
    left: TensorSpec
    right: TensorSpec
    extremes: Extremes
    """Of the left one."""
    distance: Distance | None
    """None where both have one dtype and the same bytes."""

    @property
    def equal(self) -> bool:
        """Whether dtype and bytes are the same."""
        return self.distance is None

    @property
    def same_values(self) -> bool:
        """Whether not one value differs, in whatever dtype."""
        return self.distance is None or self.distance.differing == 0

    @property
    def rounded_alike(self) -> bool:
        """Whether not one value differs, or both are equal once they are rounded to fewer bits."""
        return self.same_values or (self.distance is not None and self.distance.rounding is not None)


def compare_sources(left: TensorSource, right: TensorSource, names: Iterable[str]) -> dict[str, TensorComparison]:
    """Compare tensors that both have, in the same shape. No communication; memory: a few blocks a thread.

    Raises:
        CheckpointError: from reading.
    """
    names = list(names)
    # Reading and comparing release the interpreter's lock, so threads share the work.
    threads = min(_MOST_THREADS, os.cpu_count() or 1, len(names) or 1)
    # So that the largest tensor is not begun when the other threads have nothing left to do.
    largest_first = sorted(names, key=lambda name: -left.specs[name].numel)
    with one_thread_per_operator(), ThreadPoolExecutor(threads, "shardsmith-compare") as pool:
        try:
            found = pool.map(lambda name: compare_tensor(left, right, name), largest_first)
            results = {comparison.name: comparison for comparison in found}
        # Leaving the block waits for the pool; without this, all tensors that are still queued would be compared first.
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: results[name] for name in names}


def compare_tensor(left: TensorSource, right: TensorSource, name: str, twin: str | None = None) -> TensorComparison:
    """Compare one tensor with that of the same name, or with ``twin``, of one shape, in this thread.

    Reads it once, and a second time only if the bytes turn out to differ.
    """
    twin = name if twin is None else twin
    # Two dtypes never have the same bytes, so the sums are wanted from the first pass on.
    mine, other = left.specs[name], right.specs[twin]
    sums = None if mine.dtype == other.dtype else _Sums(mine.dtype, other.dtype)
    equal = True
    extremes: list[Tensor] = []
    for _, box in row_major_blocks(mine.shape, _BLOCK_ELEMENTS):
        a, b = block_of(left, name, box), block_of(right, twin, box)
        advance(a.nbytes + b.nbytes)
        # ``aminmax`` gives NaN as soon as one element is NaN.
        extremes += torch.aminmax(_comparable(a))
        if sums is not None:
            sums.add(a, b)
        # In the usual case, equal bytes, comparing them is all: no sums are worked out.
        else:
            equal = equal and same_bits(a, b)
    # A second pass, for the blocks before the first difference: their elements count in cosine and lengths, too.
    if not equal:
        sums = _Sums(mine.dtype, other.dtype)
        for _, box in row_major_blocks(mine.shape, _BLOCK_ELEMENTS):
            sums.add(block_of(left, name, box), block_of(right, twin, box))
    return TensorComparison(name, mine, other, _extremes(extremes), sums.distance() if sums else None)


def block_of(source: TensorSource, name: str, box: Chunk) -> Tensor:
    """Return the values of a box, contiguous: a view on the file where they lie there in one piece, else a copy."""
    # One stored piece that is the whole box: no copy is needed.
    pieces = list(source.pieces(name, box))
    if len(pieces) == 1 and pieces[0][0] == box and pieces[0][1].is_contiguous():
        return pieces[0][1]
    return read_into(source, name, box, torch.empty(box.sizes, dtype=source.specs[name].dtype, device="cpu"))


def scan_source(source: TensorSource, names: Iterable[str]) -> dict[str, Extremes]:
    """Return the extremes of some tensors, streamed."""
    names = list(names)
    with one_thread_per_operator(), ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _scan(source, name), names), strict=True))


def same_as(left: TensorSource, right: TensorSource, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield those of the pairs left's name -> right's name that hold the same bytes in one dtype and shape."""
    for mine, other in names.items():
        a, b = left.specs[mine], right.specs[other]
        if (a.shape, a.dtype) == (b.shape, b.dtype) and all(
            same_bits(block_of(left, mine, box), block_of(right, other, box))
            for _, box in row_major_blocks(a.shape, _BLOCK_ELEMENTS)
        ):
            yield mine, other


def _scan(source: TensorSource, name: str) -> Extremes:
    found: list[Tensor] = []
    for _, box in row_major_blocks(source.specs[name].shape, _BLOCK_ELEMENTS):
        found += torch.aminmax(_comparable(block_of(source, name, box)))
    return _extremes(found)


class _Sums:
    """What is added up over the blocks of two tensors."""

    def __init__(self, left: torch.dtype, right: torch.dtype) -> None:
        self.largest = 0.0
        self.dot = self.left = self.right = self.apart = 0.0
        self.differing = 0
        self.roundings = _possible_roundings(left, right)

    def add(self, left: Tensor, right: Tensor) -> None:
        # A dtype stays a candidate only as long as every block agrees in it.
        self.roundings = tuple(dtype for dtype in self.roundings if _equal_rounded(left, right, dtype))
        # Within a block, float32 does for what has at most 24 bits of mantissa; over the blocks Python adds in double.
        wide = torch.float64 if _needs_double(left) or _needs_double(right) else torch.float32
        a, b = _comparable(left).to(wide).reshape(-1), _comparable(right).to(wide).reshape(-1)
        difference = a - b
        least, greatest = (float(value) for value in torch.aminmax(difference))
        # NaN or infinity in either one, or a difference too large for the dtype.
        if not (math.isfinite(least) and math.isfinite(greatest)):
            self._add_unusual(a, b)
            return
        self.largest = max(self.largest, -least, greatest)
        self.differing += int(torch.count_nonzero(difference))
        self.apart += float(torch.dot(difference, difference))
        self._add_products(a, b)

    def _add_unusual(self, a: Tensor, b: Tensor) -> None:
        """The same where something is infinite or no number: what both have is no difference."""
        # NaN is unlike itself and infinity minus infinity is NaN: compared so, what both have alike is equal.
        apart = (a != b) & ~(a.isnan() & b.isnan())
        self.differing += int(apart.sum())
        # What only one side has is infinitely far.
        difference = torch.where(apart, (a - b).abs(), 0).nan_to_num(nan=math.inf, posinf=math.inf)
        self.largest = max(self.largest, float(difference.max()))
        self.apart += float(torch.dot(difference, difference))
        # Left out here, so that the cosine of all other elements remains a number.
        self._add_products(a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0))

    def _add_products(self, a: Tensor, b: Tensor) -> None:
        self.dot += float(torch.dot(a, b))
        self.left += float(torch.dot(a, a))
        self.right += float(torch.dot(b, b))

    def distance(self) -> Distance:
        # Two roots and one product: the product of the two sums could exceed what a double holds.
        length = math.sqrt(self.left) * math.sqrt(self.right)
        cosine = self.dot / length if length > 0 else math.nan
        lengths = math.sqrt(self.left / self.right) if self.right > 0 else math.inf
        relative = math.sqrt(self.apart / self.right) if self.right > 0 else math.inf if self.apart > 0 else 0.0
        rounding = self.roundings[0] if self.roundings else None
        return Distance(self.largest, cosine, lengths, self.differing, rounding, relative)


def _possible_roundings(left: torch.dtype, right: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes, of fewer bits than one of the two, that both could have been rounded to."""
    if not (left.is_floating_point and right.is_floating_point):
        return ()
    if left == right:
        # Of one dtype, both may have been rounded on the way to it, and then hold equal values at fewer bits.
        return tuple(dtype for dtype in _NARROW if dtype.itemsize < left.itemsize)
    # Of two, the narrower one's values may be the other's, rounded: to that dtype, or before to a still narrower one.
    narrow = min(left, right, key=lambda dtype: dtype.itemsize)
    return (narrow, *(dtype for dtype in _NARROW if dtype != narrow and dtype.itemsize < narrow.itemsize))


def _equal_rounded(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    casts = left.to(dtype), right.to(dtype)
    # An infinity in the place of a number is not that number, rounded.
    return same_bits(*casts) and not (_loses(casts[0], left) or _loses(casts[1], right))


def _loses(cast: Tensor, held: Tensor) -> bool:
    return is_narrower(cast.dtype, held.dtype) and largest_lost(cast, lambda: held) > 0


def _needs_double(values: Tensor) -> bool:
    # float32 is exact for integers up to 2**24 only.
    return values.dtype.itemsize > 4 or not values.dtype.is_floating_point


def _comparable(values: Tensor) -> Tensor:
    """In a dtype that torch compares and adds: those of 8 bits, bools and complex numbers are widened."""
    if values.dtype.is_complex:
        return torch.view_as_real(values)
    if values.dtype.is_floating_point and values.dtype.itemsize == 1:
        return values.float()
    return values.to(torch.uint8) if values.dtype == torch.bool else values


def _extremes(found: list[Tensor]) -> Extremes:
    if not found:
        return Extremes()
    # In double: extremes of integers and of float64 keep their value up to 2**53.
    values = torch.stack([value.double() for value in found])
    return Extremes(float(values.min()), float(values.max()))
