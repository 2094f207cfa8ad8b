"""Name maps: under which names, and cut into which tensors, a model's files hold what the model holds in memory.

transformers, for one, fuses the experts of a layer into one tensor in memory and keeps them apart in files; TorchTitan
has the rows of some projections in another order. A map never touches values: each tensor of the files is a ``Slice``
of one tensor in memory, so that any part of the one is made of views on the other, wherever the shards end.

Legend: "source" is a tensor in memory or in a checkpoint, "target" one of the Hugging Face files.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from shardsmith.errors import UsageError
from shardsmith.name_maps.coverage import find_impossible, find_uncovered
from shardsmith.name_maps.grids import Grid
from shardsmith.name_maps.rearranged import Link
from shardsmith.name_maps.slices import Slice as Slice
from shardsmith.name_maps.slices import Target
from shardsmith.sharding.boxes import BoxFinder
from shardsmith.tensors.tensors import Chunk, Shape, TensorSpec

ENTRY_POINTS = "shardsmith.name_maps"
"""Group of functions that take a model's config (the content of config.json, or None) and return a NameMap. One that
can be asked for as ``name:argument`` takes the argument as well."""


class NameMap(Protocol):
    """Interface of a name map: gives the files other names than the model, or cuts tensors up."""

    def targets(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, Target]:
        """Return, for these tensors of a model, name in the files -> target. Every element goes to exactly one target.

        The same on every rank. It is also asked about a few of the tensors alone.
        """
        ...


@runtime_checkable
class LeavesOut(Protocol):
    """What a ``NameMap`` has besides if the files have no place for some tensors of the model."""

    def leaves_out(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, str]:
        """Return those of these tensors that no target has anything of -> why, in half a sentence."""
        ...


@runtime_checkable
class MakesBuffers(Protocol):
    """What a ``NameMap`` has besides if it knows the values of what it leaves out."""

    def make(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Buffers that the files have no place for, as a new model has them."""
        ...


def find_name_map(name: str, config: dict[str, Any] | None) -> NameMap:
    """Return the map that an installed package offers under this name (entry points ``shardsmith.name_maps``).

    Args:
        name: Also with an argument for the map, as in ``"torchtitan:llama3/debugmodel"``.
        config: Content of the model's config.json; None without one.

    Raises:
        UsageError: there is none of that name.
    """
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    kind, colon, argument = name.partition(":")
    if kind not in offered:
        known = ", ".join(["auto", "identity", *sorted(offered)])
        raise UsageError(f"there is no name map {kind!r}. Known are: {known}; packages add more as {ENTRY_POINTS}")
    # Only the package that was asked for is imported.
    make = offered[kind].load()
    found: NameMap = make(config, argument) if colon else make(config)
    return found


class Translation:
    """What a name map makes of certain tensors, verified to put each of their elements in exactly one target.

    Attributes:
        targets: By name.
        left_out: Tensors that the map leaves out on purpose, name -> why.
    """

    def __init__(self, name_map: NameMap, specs: Mapping[str, TensorSpec]) -> None:
        """Ask the map. Raises UsageError, naming every tensor at fault, if it loses, repeats or invents something."""
        self._name_map = name_map
        self.targets = dict(name_map.targets(specs))
        self.left_out = dict(name_map.leaves_out(specs)) if isinstance(name_map, LeavesOut) else {}
        specs = {name: spec for name, spec in specs.items() if name not in self.left_out}
        pieces = [_Piece(name, *placed) for name, target in self.targets.items() for placed in target.placed]
        named = [(piece.target, piece.slice) for piece in pieces]
        slices = [piece.slice for piece in pieces]
        # Coverage is computed only from slices that lie within their sources; others would give nonsense.
        if problems := [*find_impossible(named, specs)] or [*find_uncovered(slices, specs)]:
            lines = "\n  ".join(problems)
            raise UsageError(f"the name map {type(name_map).__name__} cannot be used; nothing was written\n  {lines}")
        # By source, with a finder: a shard asks which targets its box meets, and there may be thousands of experts.
        self._pieces = {source: (found, BoxFinder(covers)) for source, found, covers in _by_source(pieces)}

    def translate(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The targets, with the dtypes that their sources have here: those that the map was asked about, or such."""
        found = {}
        for name, target in self.targets.items():
            # A joined target may have parts of different dtypes; promote_types holds the values of all of them.
            dtypes = [specs[source].dtype for source in target.sources]
            found[name] = TensorSpec(name, target.shape, functools.reduce(torch.promote_types, dtypes))
        return found

    @property
    def shapes(self) -> dict[str, Shape]:
        """For each target the shape in which ``to_targets`` says where a part of it is.

        It has the elements of the target in the same order, but more dimensions where the target's were put together.
        """
        return {n: t.grid.shape if isinstance(t, Slice) else t.shape for n, t in self.targets.items()}

    def to_targets(self, source: str, box: Chunk, values: Tensor) -> Iterator[tuple[str, Chunk, Tensor]]:
        """A box of a source, cut into parts of targets: name, place as ``shapes`` says, and its values as a view."""
        for piece in self._meeting(source, box):
            grid, there = piece.slice.grid, piece.there
            alone = isinstance(self.targets[piece.target], Slice)
            for part in grid.cut(box):
                found = grid.view(values, box, part)
                if alone:  # ``shapes`` has the dimensions of its grid: a part of that is one box, and one view
                    yield piece.target, part, found
                else:
                    for box_part in there.boxes(part):
                        values_of_part = found[box_part.within(part)]
                        yield piece.target, there.cover(box_part), there.as_box(values_of_part, box_part)

    def links_to(self, target: str) -> list[Link]:
        """Return where the elements of a target are among the sources."""
        return [Link(part.source, part.grid, there) for part, there in self.targets[target].placed]

    def links_from(self, source: str, box: Chunk) -> Iterator[Link]:
        """Yield where elements of a box of a source may be among the targets, and all of them are."""
        for piece in self._meeting(source, box):
            yield Link(piece.target, piece.there, piece.slice.grid)

    def names_of(self, sources: Iterable[str]) -> frozenset[str]:
        """Return the targets that have nothing but of these sources."""
        chosen = frozenset(sources)
        return frozenset(name for name, target in self.targets.items() if chosen.issuperset(target.sources))

    def translate_aliases(self, aliases: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Alias -> kept name of tied tensors, as the files would call them. The aliases are not among the tensors."""
        # An alias is asked about as if it were a tensor of its own; it is the twin of the target that has the same
        # slices once the alias is replaced by the kept name.
        like_kept = {alias: TensorSpec(alias, specs[kept].shape, specs[kept].dtype) for alias, kept in aliases.items()}
        twins = {target: name for name, target in self.targets.items()}
        translated = {}
        for name, target in self._name_map.targets(like_kept).items() if like_kept else ():
            twin = twins.get(target.of(aliases))
            if twin is not None:
                translated[name] = twin
        return translated

    def _meeting(self, source: str, box: Chunk) -> Iterator[_Piece]:
        pieces, finder = self._pieces.get(source, _NOWHERE)
        for i, _ in finder.meeting(box):
            yield pieces[i]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A slice in its target."""

    target: str
    slice: Slice
    there: Grid
    """Where in the target the elements of the slice's grid are."""


def _by_source(pieces: Iterable[_Piece]) -> Iterator[tuple[str, list[_Piece], list[Chunk]]]:
    """Each source with its pieces and where in it they are; empty ones cannot be met."""
    grouped: dict[str, list[_Piece]] = {}
    covers: dict[str, list[Chunk]] = {}
    for piece in pieces:
        source, grid = piece.slice.source, piece.slice.grid
        if grid.numel:
            grouped.setdefault(source, []).append(piece)
            covers.setdefault(source, []).append(grid.cover(Chunk.whole(grid.shape)))
    for source, found in grouped.items():
        yield source, found, covers[source]


_NOWHERE: tuple[list[_Piece], BoxFinder] = ([], BoxFinder([]))
