"""Random slices beside what they are of a real tensor, random name maps, and random shards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from shardsmith.name_maps.slices import Joined, Slice, Target
from shardsmith.tensors.tensors import Chunk, Shape, TensorSpec

Step = tuple[str, tuple[object, ...]]
"""Name of a method that tensors and slices have, and its arguments."""

shapes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), max_size=4).map(tuple)


def filled(shape: Shape) -> Tensor:
    """Elements that are all different."""
    return torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)


@dataclass(frozen=True)
class Case:
    """A slice, the tensor that it is of ``filled(shape)``, and how it was made."""

    shape: Shape
    slice: Slice
    tensor: Tensor
    steps: tuple[Step, ...] = ()

    @classmethod
    def whole(cls, shape: Shape, name: str = "source") -> Case:
        return cls(shape, Slice.whole(TensorSpec(name, shape, torch.int32)), filled(shape))

    def then(self, method: str, *arguments: object) -> Case:
        """Raises IndexError or ValueError where no slice can be made of it."""
        made = getattr(self.slice, method)(*arguments)
        tensor = getattr(self.tensor, method)(*arguments)
        return Case(self.shape, made, tensor, (*self.steps, (method, arguments)))


@st.composite
def rearranged(draw: st.DrawFn, case: Case, *, most: int = 4) -> Case:
    """The same elements in another order and shape."""
    for _ in range(draw(st.integers(0, most))):
        case = draw(_permuted(case) | _reshaped(case))
    return case


@st.composite
def slices(draw: st.DrawFn) -> Case:
    """Anything that a slice can be."""
    case = Case.whole(draw(shapes))
    for _ in range(draw(st.integers(0, 5))):
        case = draw(_permuted(case) | _reshaped(case) | _narrowed(case))
    return case


@st.composite
def boxes(draw: st.DrawFn, shape: Shape) -> Chunk:
    """A box that is not empty, if there is one."""
    offsets = tuple(draw(st.integers(0, max(0, size - 1))) for size in shape)
    sizes = tuple(draw(st.integers(min(1, n), n - offset)) for n, offset in zip(shape, offsets, strict=True))
    return Chunk(offsets, sizes)


@st.composite
def shards(draw: st.DrawFn, shape: Shape) -> list[Chunk]:
    """Boxes that are apart and make up a tensor, cut all the way through in some dimensions."""
    spans = []
    for size in shape:
        edges = sorted({0, size, *draw(st.sets(st.integers(0, size), max_size=2))})
        spans.append([(start, end - start) for start, end in itertools.pairwise(edges)])
    return [Chunk(tuple(s for s, _ in box), tuple(n for _, n in box)) for box in itertools.product(*spans)]


@dataclass(frozen=True)
class Known:
    """A name map that knows its answer. Each tensor of ``files`` is what the slice of that name is of ``memory``."""

    memory: dict[str, Tensor]
    files: dict[str, Tensor]
    slices: dict[str, Target]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(name, tuple(value.shape), value.dtype) for name, value in self.memory.items()}

    def targets(self, specs: Mapping[str, TensorSpec]) -> dict[str, Target]:
        return {name: part for name, part in self.slices.items() if set(part.sources) <= specs.keys()}


@st.composite
def name_maps(draw: st.DrawFn) -> Known:
    """Some tensors, each rearranged, then taken apart along a dimension, and every part rearranged again."""
    known = Known({}, {}, {})
    for i in range(draw(st.integers(1, 3))):
        whole = Case.whole(draw(shapes), f"memory.{i}")
        known.memory[whole.slice.source] = whole.tensor
        for j, part in enumerate(_taken_apart(draw, draw(rearranged(whole, most=2)))):
            case = draw(rearranged(part, most=2))
            known.slices[f"file.{i}.{j}"], known.files[f"file.{i}.{j}"] = case.slice, case.tensor.contiguous()
    if draw(st.booleans()):
        _join_some(draw, known)
    return known


def _join_some(draw: st.DrawFn, known: Known) -> None:
    """Put some of the files together into one, if they can be."""
    most = min(3, len(known.files))
    names = draw(st.lists(st.sampled_from(sorted(known.files)), min_size=1, max_size=most, unique=True))
    dim = draw(st.integers(0, 2))
    parts = [part for name in names if isinstance(part := known.slices[name], Slice)]
    try:
        joined = Joined(tuple(parts), dim)
    except ValueError:
        return
    known.files["joined"] = torch.cat([known.files.pop(name) for name in names], dim)
    known.slices["joined"] = joined
    for name in names:
        del known.slices[name]


def _taken_apart(draw: st.DrawFn, case: Case) -> Sequence[Case]:
    shape = case.slice.shape
    if not shape:
        return [case]
    dim, step = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 3))
    before = (slice(None),) * dim
    if step > 1:
        ways = [slice(i, None, step) for i in range(min(step, shape[dim]))]
    else:
        edges = sorted({0, shape[dim], *draw(st.sets(st.integers(0, shape[dim]), max_size=2))})
        ways = [slice(a, b) for a, b in itertools.pairwise(edges)]
    try:
        return [case.then("__getitem__", (*before, way)) for way in ways]
    except IndexError:  # not regular there
        return [case]


def _permuted(case: Case) -> st.SearchStrategy[Case]:
    dims = range(len(case.slice.shape))
    if not dims:
        return st.just(case)
    return st.permutations(dims).map(lambda order: case.then("permute", *order))


@st.composite
def _reshaped(draw: st.DrawFn, case: Case) -> Case:
    shape = draw(st.permutations([1, 1, *_factors(math.prod(case.slice.shape))]))
    cuts = draw(st.sets(st.integers(0, len(shape))))
    edges = sorted({0, len(shape), *cuts})
    merged = [math.prod(shape[a:b]) for a, b in itertools.pairwise(edges)]
    try:
        return case.then("reshape", *merged)
    except ValueError:  # not regular in that shape
        return case


def _factors(number: int) -> list[int]:
    for factor in (2, 3):
        if number > 1 and number % factor == 0:
            return [factor, *_factors(number // factor)]
    return [] if number == 1 else [number]


@st.composite
def _narrowed(draw: st.DrawFn, case: Case) -> Case:
    index: list[int | slice] = []
    for size in case.slice.shape:
        if size and draw(st.integers(0, 3)) == 0:
            index.append(draw(st.integers(-size, size - 1)))
        else:
            start, stop = sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2)))
            index.append(slice(start, stop, draw(st.sampled_from([1, 1, 1, 2, 3]))))
    try:
        return case.then("__getitem__", tuple(index))
    except IndexError:  # not regular there
        return case
