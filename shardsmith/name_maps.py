"""Name maps: under which names, and cut into which tensors, a model's files hold what the model holds in memory.

transformers, for one, fuses the experts of a layer into one tensor in memory and keeps them apart in files. A map never
touches values: each tensor of the files is a box of one tensor in memory, so that any part of the one is a view on a
part of the other, wherever the shards end.

Legend: B = shape of a box. "Source" is a tensor in memory or in a checkpoint, "target" one of the Hugging Face files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

from torch import Tensor

from shardsmith.boxes import BoxFinder, IrregularBoxesError, find_overlap
from shardsmith.errors import UsageError
from shardsmith.tensors import Chunk, Shape, TensorSpec

ENTRY_POINTS = "shardsmith.name_maps"
"""Group of functions that take a model's config (the content of config.json, or None) and return a NameMap."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A target: a box of one source, perhaps with its dimensions in another order, and some of size 1 dropped or added.

    ``Slice.whole(spec)[3, :50].permute(1, 0)`` is what the same would be of a tensor.
    """

    source: str
    box: Chunk
    """In the source."""
    dims: tuple[int | None, ...]
    """For each dimension of the target that of the source along which it runs; None for an added one of size 1. What
    is not named is dropped: there the box has size 1."""

    @classmethod
    def whole(cls, spec: TensorSpec) -> Slice:
        """All of a source, as it is."""
        return cls(spec.name, Chunk.whole(spec.shape), tuple(range(len(spec.shape))))

    @property
    def shape(self) -> Shape:
        """Of the target."""
        return tuple(1 if dim is None else self.box.sizes[dim] for dim in self.dims)

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> Slice:
        """A part of it: numbers drop a dimension, slices (of step 1) narrow it."""
        items = index if isinstance(index, tuple) else (index,)
        if len(items) > len(self.shape):
            raise IndexError(f"{len(items)} indices into a tensor of shape {self.shape}")
        offsets, sizes, kept = [], [], []
        for dim, size in enumerate(self.shape):
            item = items[dim] if dim < len(items) else slice(None)
            if isinstance(item, slice):
                start, stop, step = item.indices(size)
                if step != 1:
                    raise IndexError(f"{item}: a slice of every {step}th element is no box")
                kept.append(dim)
            else:
                start = range(size)[item]
                stop = start + 1
            offsets.append(start)
            sizes.append(max(0, stop - start))
        return self.part(Chunk(tuple(offsets), tuple(sizes)), tuple(kept))

    def permute(self, *order: int) -> Slice:
        """The same with its dimensions in another order."""
        return self.part(Chunk.whole(self.shape), order)

    def part(self, box: Chunk, dims: tuple[int | None, ...]) -> Slice:
        """What ``Slice(self, box, dims)`` would be if this target were a source, as a slice of the real source."""
        return Slice(self.source, self.to_source(box), tuple(None if dim is None else self.dims[dim] for dim in dims))

    def to_source(self, box: Chunk) -> Chunk:
        """Where in the source a box of the target lies."""
        offsets, sizes = list(self.box.offsets), list(self.box.sizes)
        for dim, offset, size in zip(self.dims, box.offsets, box.sizes, strict=True):
            if dim is not None:
                offsets[dim] += offset
                sizes[dim] = size
        return Chunk(tuple(offsets), tuple(sizes))

    def to_target(self, box: Chunk) -> Chunk:
        """Where in the target a box of the source lies, which must lie inside ``self.box``."""
        return Chunk(
            tuple(0 if dim is None else box.offsets[dim] - self.box.offsets[dim] for dim in self.dims),
            tuple(1 if dim is None else box.sizes[dim] for dim in self.dims),
        )

    def view(self, values: Tensor) -> Tensor:
        """The values of a box of the source, of shape B, as those of the target's box. Shares memory."""
        kept = [dim for dim in self.dims if dim is not None]
        dropped = [dim for dim in range(values.dim()) if dim not in kept]
        shape = [1 if dim is None else values.shape[dim] for dim in self.dims]
        return values.permute(kept + dropped).view(shape)


class NameMap(Protocol):
    """What users write to give the files other names, or to cut tensors up."""

    def targets(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, Slice]:
        """Name in the files -> what it is, for these tensors of a model. Every element goes to exactly one target.

        The same on every rank. It is also asked about a few of the tensors alone.
        """
        ...


def find_name_map(name: str, config: dict[str, Any] | None) -> NameMap:
    """The map that an installed package offers under this name in the entry-point group ``shardsmith.name_maps``.

    Raises:
        UsageError: there is none of that name.
    """
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in offered:
        known = ", ".join(["auto", "identity", *sorted(offered)])
        raise UsageError(f"there is no name map {name!r}. Known are: {known}; packages add more as {ENTRY_POINTS}")
    found: NameMap = offered[name].load()(config)
    return found


class Translation:
    """What a name map makes of certain tensors, with the proof that each of their elements is in exactly one target.

    Attributes:
        slices: By target.
    """

    def __init__(self, name_map: NameMap, specs: Mapping[str, TensorSpec]) -> None:
        """Ask the map. Raises UsageError, naming every tensor at fault, if it loses, repeats or invents something."""
        self._name_map = name_map
        self.slices = dict(name_map.targets(specs))
        if problems := [*_find_impossible(self.slices, specs)] or [*_find_uncovered(self.slices, specs)]:
            lines = "\n  ".join(problems)
            raise UsageError(f"the name map {type(name_map).__name__} cannot be used; nothing was written\n  {lines}")
        self._targets = {source: (names, BoxFinder(boxes)) for source, names, boxes in _by_source(self.slices)}

    @property
    def is_trivial(self) -> bool:
        """Whether it changes neither a name nor a shape."""
        return all(name == part.source for name, part in self.slices.items()) and all(
            dim in (None, i) for part in self.slices.values() for i, dim in enumerate(part.dims)
        )

    def translate(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The targets, with the dtypes that their sources have here: those that the map was asked about, or such."""
        return {name: TensorSpec(name, part.shape, specs[part.source].dtype) for name, part in self.slices.items()}

    def to_targets(self, source: str, box: Chunk, values: Tensor) -> Iterator[tuple[str, Chunk, Tensor]]:
        """A box of a source, cut into boxes of targets: name, box, and its values as a view."""
        names, finder = self._targets[source]
        for i, common in finder.meeting(box):
            part = self.slices[names[i]]
            yield names[i], part.to_target(common), part.view(values[common.within(box)])

    def names_of(self, sources: Iterable[str]) -> frozenset[str]:
        """The targets that these sources become."""
        chosen = frozenset(sources)
        return frozenset(name for name, part in self.slices.items() if part.source in chosen)

    def translate_aliases(self, aliases: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Alias -> kept name of tied tensors, as the files would call them. The aliases are not among the tensors."""
        like_kept = {alias: TensorSpec(alias, specs[kept].shape, specs[kept].dtype) for alias, kept in aliases.items()}
        twins = {part: name for name, part in self.slices.items()}
        translated = {}
        for name, part in self._name_map.targets(like_kept).items() if like_kept else ():
            twin = twins.get(Slice(aliases[part.source], part.box, part.dims))
            if twin is not None:
                translated[name] = twin
        return translated


def _by_source(slices: Mapping[str, Slice]) -> Iterator[tuple[str, list[str], list[Chunk]]]:
    """Each source with its targets and their boxes in it; empty tensors have none that could be met."""
    grouped: dict[str, list[str]] = {}
    for name, part in slices.items():
        names = grouped.setdefault(part.source, [])
        if part.box.numel:
            names.append(name)
    for source, names in grouped.items():
        yield source, names, [slices[name].box for name in names]


def _find_impossible(slices: Mapping[str, Slice], specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    for name, part in slices.items():
        spec = specs.get(part.source)
        if spec is None:
            yield f"{name}: made of {part.source}, which is not there"
        elif not _fits(part, spec.shape):
            yield f"{name}: {part} is no slice of a tensor of shape {spec.shape}"


def _fits(part: Slice, shape: Shape) -> bool:
    box, kept = part.box, [dim for dim in part.dims if dim is not None]
    if len(box.offsets) != len(shape) or len(box.sizes) != len(shape) or len(set(kept)) != len(kept):
        return False
    if any(min(a, n) < 0 or a + n > g for a, n, g in zip(box.offsets, box.sizes, shape, strict=True)):
        return False
    dropped = set(range(len(shape))).difference(kept)
    return set(kept) <= set(range(len(shape))) and all(box.sizes[dim] == 1 for dim in dropped)


def _find_uncovered(slices: Mapping[str, Slice], specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    boxes = {source: found for source, _, found in _by_source(slices)}
    for source, spec in specs.items():
        found = boxes.get(source)
        absent = spec.numel - sum(box.numel for box in found or ())
        if found is None:
            yield f"{source}: used by no target"
        elif _overlap(found):
            yield f"{source}: some of it is used twice"
        elif absent:
            yield f"{source}: {absent} of {spec.numel} elements are used by no target"


def _overlap(boxes: list[Chunk]) -> bool:
    try:
        return len(set(boxes)) < len(boxes) or find_overlap(boxes) is not None
    except IrregularBoxesError:
        return True
