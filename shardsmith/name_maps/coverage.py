"""The verification that slices take each element of their sources exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shardsmith.name_maps.grids import Axis, Grid
from shardsmith.name_maps.slices import Slice
from shardsmith.sharding.boxes import BoxFinder, IrregularBoxesError, find_overlap
from shardsmith.tensors.tensors import Chunk, Shape, TensorSpec

_MAX_COMPARISONS = 10_000  # of pairs that are no cells of one grid: seconds

Indices = tuple[int, tuple[Axis, ...]]
"""Which indices of one dimension a slice has: the first one, and the axes."""


def find_impossible(slices: Iterable[tuple[str, Slice]], specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Yield a line for each slice, which comes with the name of its target, that is none of any of the tensors."""
    for name, part in slices:
        spec = specs.get(part.source)
        if spec is None:
            yield f"{name}: made of {part.source}, which is not there"
        elif not part.grid.fits(spec.shape):
            yield f"{name}: {part} is no slice of a tensor of shape {spec.shape}"


def find_uncovered(slices: Iterable[Slice], specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Yield a line for each tensor of which something is in no target, or in several. The slices are possible ones."""
    grids: dict[str, list[Grid]] = {}
    for part in slices:
        grids.setdefault(part.source, []).append(part.grid)
    for source, spec in specs.items():
        found = grids.get(source)
        # Nothing is outside (find_impossible) and nothing overlaps, so the sum says whether all is there.
        absent = spec.numel - sum(grid.numel for grid in found or ())
        if found is None:
            yield f"{source}: used by no target"
        elif _overlap([grid for grid in found if grid.numel], spec.shape):
            yield f"{source}: some of it is used twice"
        elif absent:
            yield f"{source}: {absent} of {spec.numel} elements are used by no target"


def _overlap(grids: Sequence[Grid], shape: Shape) -> bool:
    """Whether an element is in two of them, or they are so irregular that telling would take minutes."""
    if len(grids) < 2:
        return False
    # A grid that fills its cover is a box, and boxes are compared without enumerating elements.
    covers = [grid.cover(Chunk.whole(grid.shape)) for grid in grids]
    if all(grid.numel == cover.numel for grid, cover in zip(grids, covers, strict=True)):
        try:
            # find_overlap takes different boxes only, so equal ones are found first.
            return len(set(covers)) < len(covers) or find_overlap(covers) is not None
        # Counts as an overlap: a map that cannot be verified must not be used.
        except IrregularBoxesError:
            return True
    return not _are_cells(grids, shape) and _any_meet(grids, covers)


def _are_cells(grids: Sequence[Grid], shape: Shape) -> bool:
    """Whether they differ, and in each dimension any two of them have the same indices or none in common."""
    keys = [_indices(grid) for grid in grids]
    if len(set(keys)) < len(keys):
        return False
    for dim, size in enumerate(shape):
        # How many distinct index sets use each index: more than one means that two of them partly overlap.
        uses = torch.zeros(size, dtype=torch.int64, device="cpu")
        for indices in {key[dim] for key in keys}:
            uses[_enumerate(indices)] += 1
        if bool((uses > 1).any()):
            return False
    return True


def _any_meet(grids: Sequence[Grid], covers: Sequence[Chunk]) -> bool:
    finder = BoxFinder(covers)
    pairs = ((i, j) for i, cover in enumerate(covers) for j, _ in finder.meeting(cover) if i < j)
    for count, (i, j) in enumerate(pairs):
        dims = zip(_indices(grids[i]), _indices(grids[j]), strict=True)
        # Grids are products of their dimensions: they meet only if they share an index in each.
        if count >= _MAX_COMPARISONS or all(_share_one(a, b) for a, b in dims):
            return True
    return False


def _share_one(a: Indices, b: Indices) -> bool:
    return a == b or bool(torch.isin(_enumerate(a), _enumerate(b)).any())


def _indices(grid: Grid) -> tuple[Indices, ...]:
    """For each dimension of the tensor. A grid has all the combinations of them."""
    return tuple((grid.start[dim], tuple(axes)) for dim, axes in grid.along_dims())


def _enumerate(indices: Indices) -> Tensor:
    start, axes = indices
    found = torch.tensor([start], device="cpu")
    for axis in axes:
        found = (found[:, None] + torch.arange(axis.size, device="cpu") * axis.step).reshape(-1)
    return found
