"""Which slices a function makes of tensors, found out by running it on tensors without data.

Views share their tensor's storage, so strides and offset tell where they lie. A copy begins a storage of its own, of
which it is noted what it is a copy of. Whatever else is computed has a storage that nothing is known of.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardsmith.name_maps.grids import Axis, Grid
from shardsmith.name_maps.slices import Joined, Slice, Target
from shardsmith.tensors.tensors import Chunk, Shape, TensorSpec

_aten = torch.ops.aten
_COPIES = {_aten.clone.default, _aten._to_copy.default}
_JOINS = {_aten.cat.default, _aten.stack.default}


def trace(
    function: Callable[[dict[str, Tensor]], Mapping[str, Any]], specs: Mapping[str, TensorSpec]
) -> tuple[dict[str, Target], list[str]]:
    """Run a function of named tensors that returns named tensors, on meta tensors.

    It may slice, permute, reshape, split, copy and concatenate them.

    Returns:
        What each result is made of, and the names of those that are computed in other ways.
    """
    probes = Probes(specs)
    with probes:
        made = function(dict(probes.tensors))
    found = {name: probes.content_of(result) for name, result in made.items() if isinstance(result, Tensor)}
    targets = {name: target for name, target in found.items() if target is not None}
    return targets, [name for name in made if name not in targets]


class Probes(TorchDispatchMode):
    """Meta tensors; within it, what is cut out of them and copied can be traced back to them.

    Attributes:
        tensors: A probe for each tensor.
    """

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__()
        self.tensors = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
        # The tensor is held, too: a storage that is freed would give its address to another one.
        self._known: dict[int, tuple[Tensor, Target]] = {}  # by storage: a tensor that is all of it, and what it holds
        for name, spec in specs.items():
            self._note(self.tensors[name], Slice.whole(spec))

    def content_of(self, tensor: Tensor) -> Target | None:
        """Return what a tensor holds, if it was cut out of probes."""
        # Another dtype is a reinterpretation of the bytes; a pending negation or conjugation changes the values.
        whole, content = self._known.get(tensor.untyped_storage()._cdata, (None, None))
        if whole is None or content is None or tensor.dtype != whole.dtype or tensor.is_neg() or tensor.is_conj():
            return None
        if isinstance(content, Joined):
            # A part of a concatenation may cross the border of its parts, so only all of it is accepted.
            is_whole = tensor.shape == whole.shape and tensor.stride() == whole.stride()
            return content if is_whole and tensor.storage_offset() == whole.storage_offset() else None
        return _view_of(tensor, content)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Written in place: the storage no longer holds what was noted.
        for tensor in _written_by(func, args, kwargs or {}):
            self._known.pop(tensor.untyped_storage()._cdata, None)
        if func in _COPIES and result.dtype == args[0].dtype and result.is_meta:
            self._note_copy(result, self.content_of(args[0]))
        elif func in _JOINS and all(tensor.dtype == result.dtype for tensor in args[0]):
            dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
            self._note_copy(result, self._join(args[0], dim % result.dim(), stacked=func is _aten.stack.default))
        return result

    def _join(self, tensors: Sequence[Tensor], dim: int, *, stacked: bool) -> Target | None:
        # An empty tensor adds nothing to a concatenation.
        contents = [self.content_of(tensor) for tensor in tensors if tensor.numel() or len(tensors) == 1]
        parts = [content for content in contents if isinstance(content, Slice)]
        if len(parts) < len(contents):
            return None
        if stacked:
            # stack is cat along a new dimension of size 1.
            parts = [part.reshape(*part.shape[:dim], 1, *part.shape[dim:]) for part in parts]
        try:
            return parts[0] if len(parts) == 1 else Joined(tuple(parts), dim)
        except ValueError:  # not all of them are simple enough
            return None

    def _note_copy(self, copy: Tensor, content: Target | None) -> None:
        """A copy may keep the strides of what it was made from: it is all of its storage in their order only."""
        # From the slowest stride to the fastest; of equal strides the larger dimension is the slower one.
        order = sorted(range(copy.dim()), key=lambda dim: (-copy.stride()[dim], -copy.shape[dim]))
        if content is None or not copy.permute(order).is_contiguous():
            return
        if isinstance(content, Slice):
            content = content.permute(*order)
        self._note(copy, content)

    def _note(self, tensor: Tensor, content: Target) -> None:
        self._known[tensor.untyped_storage()._cdata] = (tensor, content)


def _written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    if not func._schema.is_mutable:
        return
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (tensor for tensor in tree_leaves(given) if isinstance(tensor, Tensor))


def _view_of(view: Tensor, content: Slice) -> Slice | None:
    """What a view has of a storage that holds ``content`` in row-major order; None if it is not regular there."""
    if view.numel() == 0:
        return Slice.of_axes(content.source, content.start, [[Axis(0, 1, size)] for size in view.shape])
    # The storage has the content in row-major order: these are the strides that each of its axes has there.
    axes = content.grid.axes
    strides = [math.prod(axis.size for axis in axes[i + 1 :]) for i in range(len(axes))]
    # The storage offset written in the mixed radix of the content's axes.
    start = tuple(view.storage_offset() // stride % axis.size for stride, axis in zip(strides, axes, strict=True))
    steps = [
        _steps(size, stride, start, strides, content) for size, stride in zip(view.shape, view.stride(), strict=True)
    ]
    if any(found is None for found in steps):
        return None
    dims = [found for found in steps if found is not None]
    if not Grid(start, tuple(itertools.chain(*dims))).fits(content.grid.shape):
        return None
    place = content.grid.cover(Chunk(start, (1,) * len(start)))
    of_source = [[Axis(axes[a.dim].dim, axes[a.dim].step * a.step, a.size) for a in found] for found in dims]
    return Slice.of_axes(content.source, place.offsets, of_source)


def _steps(size: int, stride: int, start: Shape, strides: Sequence[int], content: Slice) -> list[Axis] | None:
    """One dimension of a view as axes along those of the content, slowest first; None if it is not regular there."""
    sizes = content.grid.shape
    found: list[Axis] = []
    while size > 1:
        # The axis along which one step of the view moves: the stride is that of the axis or more, within its extent.
        along = next((i for i, inner in enumerate(strides) if inner <= stride < inner * sizes[i]), None)
        if along is None or stride % strides[along]:
            return None
        step = stride // strides[along]
        count = min(size, -(-(sizes[along] - start[along]) // step))
        if count < size:  # it goes on along the next axis, if it goes through all of this one
            count = sizes[along] // step
            if sizes[along] % step or start[along] >= step or size % count:
                return None
        # The view goes on along the next axis outward with what is left of its size.
        found.insert(0, Axis(along, step, count))
        size, stride = size // count, strides[along] * sizes[along]
    return found
