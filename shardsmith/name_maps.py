"""Name maps: under which names, and cut into which tensors, a model's files hold what the model holds in memory.

transformers, for one, fuses the experts of a layer into one tensor in memory and keeps them apart in files; TorchTitan
has the rows of some projections in another order. A map never touches values: each tensor of the files is a ``Slice``
of one tensor in memory, so that any part of the one is made of views on the other, wherever the shards end.

Legend: "source" is a tensor in memory or in a checkpoint, "target" one of the Hugging Face files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from shardsmith.boxes import BoxFinder
from shardsmith.coverage import find_impossible, find_uncovered
from shardsmith.errors import UsageError
from shardsmith.slices import Slice as Slice
from shardsmith.tensors import Chunk, Shape, TensorSpec

ENTRY_POINTS = "shardsmith.name_maps"
"""Group of functions that take a model's config (the content of config.json, or None) and return a NameMap. One that
can be asked for as ``name:argument`` takes the argument as well."""

_NOWHERE: tuple[list[str], BoxFinder] = ([], BoxFinder([]))


class NameMap(Protocol):
    """What users write to give the files other names, or to cut tensors up."""

    def targets(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, Slice]:
        """Name in the files -> what it is, for these tensors of a model. Every element goes to exactly one target.

        The same on every rank. It is also asked about a few of the tensors alone.
        """
        ...


@runtime_checkable
class LeavesOut(Protocol):
    """What a ``NameMap`` has besides if the files have no place for some tensors of the model."""

    def leaves_out(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, str]:
        """Those of these tensors that no target has anything of -> why, in half a sentence."""
        ...


def find_name_map(name: str, config: dict[str, Any] | None) -> NameMap:
    """The map that an installed package offers under this name in the entry-point group ``shardsmith.name_maps``.

    Args:
        name: Also with an argument for the map, as in ``"torchtitan:llama3/debugmodel"``.

    Raises:
        UsageError: there is none of that name.
    """
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    kind, colon, argument = name.partition(":")
    if kind not in offered:
        known = ", ".join(["auto", "identity", *sorted(offered)])
        raise UsageError(f"there is no name map {kind!r}. Known are: {known}; packages add more as {ENTRY_POINTS}")
    make = offered[kind].load()
    found: NameMap = make(config, argument) if colon else make(config)
    return found


class Translation:
    """What a name map makes of certain tensors, with the proof that each of their elements is in exactly one target.

    Attributes:
        slices: By target.
        left_out: Tensors that the map leaves out on purpose, name -> why.
    """

    def __init__(self, name_map: NameMap, specs: Mapping[str, TensorSpec]) -> None:
        """Ask the map. Raises UsageError, naming every tensor at fault, if it loses, repeats or invents something."""
        self._name_map = name_map
        self.slices = dict(name_map.targets(specs))
        self.left_out = dict(name_map.leaves_out(specs)) if isinstance(name_map, LeavesOut) else {}
        specs = {name: spec for name, spec in specs.items() if name not in self.left_out}
        if problems := [*find_impossible(self.slices, specs)] or [*find_uncovered(self.slices, specs)]:
            lines = "\n  ".join(problems)
            raise UsageError(f"the name map {type(name_map).__name__} cannot be used; nothing was written\n  {lines}")
        self._targets = {source: (names, BoxFinder(covers)) for source, names, covers in _by_source(self.slices)}

    def translate(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The targets, with the dtypes that their sources have here: those that the map was asked about, or such."""
        return {name: TensorSpec(name, part.shape, specs[part.source].dtype) for name, part in self.slices.items()}

    @property
    def shapes(self) -> dict[str, Shape]:
        """For each target the shape in which ``to_targets`` says where a part of it is: that of its slice's grid.

        It has the elements of the target in the same order, but more dimensions where the target's were put together.
        """
        return {name: part.grid.shape for name, part in self.slices.items()}

    def to_targets(self, source: str, box: Chunk, values: Tensor) -> Iterator[tuple[str, Chunk, Tensor]]:
        """A box of a source, cut into parts of targets: name, place as ``shapes`` says, and its values as a view."""
        for name, slice_ in self.targets_of(source, box):
            grid = slice_.grid
            for part in grid.cut(box):
                yield name, part, grid.view(values, box, part)

    def targets_of(self, source: str, box: Chunk) -> Iterator[tuple[str, Slice]]:
        """The targets in which elements of a box may be, and all in which some are."""
        names, finder = self._targets.get(source, _NOWHERE)
        for i, _ in finder.meeting(box):
            yield names[i], self.slices[names[i]]

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
            twin = twins.get(replace(part, source=aliases[part.source]))
            if twin is not None:
                translated[name] = twin
        return translated


def _by_source(slices: Mapping[str, Slice]) -> Iterator[tuple[str, list[str], list[Chunk]]]:
    """Each source with its targets and where in it they are; empty tensors have none that could be met."""
    grouped: dict[str, list[str]] = {}
    covers: dict[str, list[Chunk]] = {}
    for name, part in slices.items():
        names = grouped.setdefault(part.source, [])
        grid = part.grid
        if grid.numel:
            names.append(name)
            covers.setdefault(part.source, []).append(grid.cover(Chunk.whole(grid.shape)))
    for source, names in grouped.items():
        yield source, names, covers.get(source, [])
