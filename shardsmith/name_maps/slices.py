"""``Slice``: a tensor that is made of another one by slicing, permuting and reshaping it, written as that would be.

``Joined`` are several of them in one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shardsmith.name_maps.grids import Axis, Grid
from shardsmith.tensors.tensors import Chunk, Shape, TensorSpec


@dataclass(frozen=True, slots=True)
class Slice:
    """A target: elements of one source, in the order in which slicing, permuting and reshaping have brought them.

    ``Slice.whole(spec).reshape(8, 2, 64, 512).permute(0, 2, 1, 3)[:, :50]`` is what the same would be of a tensor. It
    is normal: two ways to say the same give equal slices.
    """

    source: str
    start: Shape
    """Where in the source its first element is."""
    dims: tuple[tuple[Axis, ...], ...]
    """For each dimension of the target what it runs over in the source: nothing if its size is 1, one axis if it is
    part of a dimension of the source, several, slowest first, if it was put together from several."""

    @classmethod
    def whole(cls, spec: TensorSpec) -> Slice:
        """Return all of a source, as it is."""
        return cls.of_axes(spec.name, (0,) * len(spec.shape), _axes(spec.shape))

    @classmethod
    def of_axes(cls, source: str, start: Shape, dims: Iterable[Sequence[Axis]]) -> Slice:
        """Return what begins at ``start`` and has these axes along its dimensions; made normal."""
        return cls(source, start, tuple(_joined(axes) for axes in dims))

    @property
    def shape(self) -> Shape:
        """Of the target."""
        return tuple(math.prod(axis.size for axis in axes) for axes in self.dims)

    @property
    def sources(self) -> tuple[str, ...]:
        """The one that it is of."""
        return (self.source,)

    @property
    def placed(self) -> list[tuple[Slice, Grid]]:
        """Itself, and where in the target the elements of its grid are."""
        return [(self, self.target)]

    def of(self, names: Mapping[str, str]) -> Slice:
        """Return the same of a source that has another name."""
        return replace(self, source=names[self.source])

    @property
    def grid(self) -> Grid:
        """Where its elements are in the source. Its axes are in the target's order."""
        return Grid(self.start, tuple(axis for axes in self.dims for axis in axes))

    @property
    def target(self) -> Grid:
        """Where the elements of ``grid`` are in the target: in row-major order."""
        return _row_major(self.dims)

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> Slice:
        """A part of it: numbers drop a dimension, slices narrow it.

        Raises:
            IndexError: there is no such part, or in a dimension that was put together it is no regular one.
        """
        items = index if isinstance(index, tuple) else (index,)
        if len(items) > len(self.dims):
            raise IndexError(f"{len(items)} indices into a tensor of shape {self.shape}")
        start, dims = list(self.start), []
        rest = (slice(None),) * (len(self.dims) - len(items))
        for axes, item in zip(self.dims, (*items, *rest), strict=True):
            narrowed, places = _narrowed(axes, item)
            for axis, first in zip(axes, places, strict=True):
                start[axis.dim] += first * axis.step
            if isinstance(item, slice):
                dims.append(narrowed)
        return self.of_axes(self.source, tuple(start), dims)

    def permute(self, *order: int) -> Slice:
        """Return the same with its dimensions in another order."""
        if sorted(order) != list(range(len(self.dims))):
            raise ValueError(f"{order} is no order of the dimensions of a tensor of shape {self.shape}")
        return replace(self, dims=tuple(self.dims[dim] for dim in order))

    def transpose(self, dim: int, other: int) -> Slice:
        """Return the same with two dimensions exchanged."""
        order = list(range(len(self.dims)))
        order[dim], order[other] = order[other], order[dim]
        return self.permute(*order)

    def reshape(self, *shape: int) -> Slice:
        """Return the same elements in the same order in another shape, one size of which may be -1.

        Raises:
            ValueError: they do not fit, or would not be at regular steps, as when (4, 6) becomes (6, 4).
        """
        wanted, numel = list(shape), math.prod(self.shape)
        if -1 in shape:
            # The -1 itself makes the product of the shape negative.
            wanted[shape.index(-1)] = numel // max(1, -math.prod(shape))
        if math.prod(wanted) != numel or min(wanted, default=1) < 0:
            raise ValueError(f"a tensor of shape {self.shape} cannot have the shape {shape}")
        # Without elements every shape is regular.
        if not numel:
            return self.of_axes(self.source, self.start, _axes(wanted))
        axes = list(self.grid.axes)
        try:
            # From the last dimension on: in row-major order its elements lie next to each other in the old axes.
            dims = [_take(axes, size) for size in reversed(wanted)]
        except ValueError as error:
            raise ValueError(f"a tensor of shape {self.shape} is not regular in the shape {shape}: {error}") from None
        return self.of_axes(self.source, self.start, reversed(dims))


@dataclass(frozen=True, slots=True)
class Joined:
    """A target: slices one after the other along a dimension, as ``torch.cat`` puts them together."""

    parts: tuple[Slice, ...]
    """Of equal shapes but for the one dimension."""
    dim: int

    def __post_init__(self) -> None:
        shapes = {part.shape[: self.dim] + part.shape[self.dim + 1 :] for part in self.parts}
        ranks = {len(part.shape) for part in self.parts}
        if len(shapes) != 1 or len(ranks) != 1 or not 0 <= self.dim < min(ranks):
            raise ValueError(
                f"slices of shapes {[part.shape for part in self.parts]} cannot be joined along {self.dim}"
            )

    @property
    def shape(self) -> Shape:
        """Of the target."""
        first = self.parts[0].shape
        return (*first[: self.dim], sum(part.shape[self.dim] for part in self.parts), *first[self.dim + 1 :])

    @property
    def sources(self) -> tuple[str, ...]:
        """Those that it is of."""
        return tuple(part.source for part in self.parts)

    @property
    def placed(self) -> list[tuple[Slice, Grid]]:
        """Each part, and where in the target the elements of its grid are."""
        found, offset = [], 0
        for part in self.parts:
            start = (*(0,) * self.dim, offset, *(0,) * (len(part.shape) - self.dim - 1))
            found.append((part, Grid(start, part.target.axes)))
            offset += part.shape[self.dim]
        return found

    def of(self, names: Mapping[str, str]) -> Joined:
        """Return the same of sources that have other names."""
        return Joined(tuple(part.of(names) for part in self.parts), self.dim)


Target = Slice | Joined


def _narrowed(axes: tuple[Axis, ...], item: int | slice) -> tuple[list[Axis], list[int]]:
    """A part of one dimension: its axes, and for each of the old ones the index of its first element.

    Raises IndexError if there is none, or no regular one.
    """
    if isinstance(item, slice) and item == slice(None):
        return list(axes), [0] * len(axes)
    size = math.prod(axis.size for axis in axes)
    index = range(size)[item]
    chosen = index if isinstance(index, range) else range(index, index + 1)
    if not chosen:
        return [Axis(0, 1, 0)], [0] * len(axes)
    # A single element has any step; 1 keeps the slice normal.
    step = chosen.step if len(chosen) > 1 else 1
    if len(axes) == 1 and step > 0:
        return [Axis(axes[0].dim, axes[0].step * step, len(chosen))], [chosen[0]]
    # A dimension of several axes is a mixed-radix number: a range of it is regular only if it is one box of digits.
    parts = _row_major([axes]).cut(Chunk((chosen[0],), (len(chosen),))) if step == 1 else []
    if len(parts) != 1:
        sizes = " x ".join(str(axis.size) for axis in axes)
        raise IndexError(f"{item} of a dimension of {sizes} is not at regular steps; reshape it first")
    (part,) = parts
    return [Axis(a.dim, a.step, n) for a, n in zip(axes, part.sizes, strict=True)], list(part.offsets)


def _row_major(dims: Sequence[Sequence[Axis]]) -> Grid:
    """Axes where they are in a tensor of whose dimensions each is made of some of them."""
    found = []
    for dim, axes in enumerate(dims):
        step = math.prod(axis.size for axis in axes)
        for axis in axes:
            step = step // axis.size if axis.size else 1
            found.append(Axis(dim, step, axis.size))
    return Grid((0,) * len(dims), tuple(found))


def _axes(shape: Sequence[int]) -> list[list[Axis]]:
    """A dimension each of a tensor of this shape."""
    return [[Axis(dim, 1, size)] for dim, size in enumerate(shape)]


def _joined(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The same without axes of size 1, and with one axis for those that continue each other."""
    found: list[Axis] = []
    for axis in axes:
        if axis.size == 1:
            continue
        # A wide axis that continues a finer one is one longer axis: so equal slices compare equal.
        if found and found[-1].dim == axis.dim and found[-1].step == axis.step * axis.size:
            axis = Axis(axis.dim, axis.step, found.pop().size * axis.size)
        found.append(axis)
    return tuple(found)


def _take(axes: list[Axis], size: int) -> list[Axis]:
    """Remove from the end of a list what makes up a dimension of this size, splitting one of them if need be."""
    taken: list[Axis] = []
    while size > 1:
        axis = axes.pop()
        # The inner part of the axis becomes the dimension; the outer part stays for the dimensions before it.
        if axis.size > size and axis.size % size == 0:
            axes.append(replace(axis, size=axis.size // size, step=axis.step * size))
            axis = replace(axis, size=size)
        if size % axis.size:
            raise ValueError(f"{axis.size} neighbours cannot be cut into groups of {size}")
        size //= axis.size
        taken.insert(0, axis)
    return taken
