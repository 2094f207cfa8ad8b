"""The way back: a model as it is in memory, out of files that hold it under other names and cut into other tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shardsmith.errors import CheckpointNotFoundError, MismatchError
from shardsmith.name_maps.maps import NameMap, Translation
from shardsmith.name_maps.rearranged import Link, read_linked
from shardsmith.tensors.tensors import Chunk, TensorSource, TensorSpec


class RestoredModel:
    """A model as it is in memory, read from its files (a ``TensorSource``): the inverse of ``TranslatedModel``.

    Reads as little as a box needs. A tensor has the dtype that its files have.

    Attributes:
        aliases: The names of tied tensors, alias -> kept. They can be read and are not among ``specs``.
        unused: Tensors of the files that the model has no place for.
        absent: Tensors of the model that such files have no place for, name -> why. They are among ``specs`` only if
            they were given.
        twice: Names of tied tensors that the files hold under both names, alias -> kept, as the files call them. The
            kept one is read.
    """

    def __init__(
        self,
        files: TensorSource,
        name_map: NameMap,
        specs: Mapping[str, TensorSpec],
        aliases: Mapping[str, str] | None = None,
        made: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Compare the files with what the model needs.

        Args:
            files: The tensors of the files.
            name_map: From the model to its files.
            specs: The model's tensors, without aliases. Their dtypes do not matter.
            aliases: Of the tied ones, alias -> kept. It is enough if the files have one of them.
            made: Values for what the files have no place for.

        Raises:
            UsageError: the map loses, repeats or invents something.
            MismatchError: tensors are missing from the files or have other shapes there; it names all of them.
        """
        self.path = files.path
        self._files = files
        self._translation = Translation(name_map, specs)
        self.absent = self._translation.left_out
        self.aliases = dict(aliases or {})
        self._made = {name: value for name, value in (made or {}).items() if name in self.absent}
        wanted = self._translation.translate(specs)
        twins = self._translation.translate_aliases(self.aliases, specs)
        self._stored = {name: name for name in wanted}
        # Files may hold a tied tensor under the alias only: then it is read from there.
        self._stored |= {kept: alias for alias, kept in twins.items() if kept not in files.specs}
        self.unused = tuple(name for name in files.specs if name not in wanted and name not in twins)
        self.twice = {alias: kept for alias, kept in twins.items() if alias in files.specs and kept in files.specs}
        # Before any value is read: all missing names are reported at once.
        self._check(wanted)
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, spec.shape, self._dtype(name, spec))
            for name, spec in specs.items()
            if name not in self.absent or name in self._made
        }

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        """As ``TensorSource.pieces``."""
        name = self.aliases.get(name, name)
        if name not in self.specs:
            raise CheckpointNotFoundError(self.path, f"has no tensor named {name!r}")
        if name in self._made:
            yield box, self._made[name][box.within(Chunk.whole(self.specs[name].shape))]
            return
        links = self._translation.links_from(name, box)
        stored = (Link(self._stored[link.name], link.here, link.there) for link in links)
        yield from read_linked(self._files, stored, box, self.specs[name].dtype)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _check(self, wanted: Mapping[str, TensorSpec]) -> None:
        problems = []
        for name, spec in wanted.items():
            found = self._files.specs.get(self._stored[name])
            if found is None:
                problems.append(f"{name}: not in the files")
            elif found.shape != spec.shape:
                problems.append(f"{name}: {found.shape} in the files, {spec.shape} in the model")
        if problems:
            summary = (
                f"{len(problems)} of the {len(wanted)} tensors that the model needs are not there as it needs them"
            )
            some = f", such as {', '.join(self.unused[:5])}" if self.unused else ""
            advice = f"The files have {len(self.unused)} that it has no place for{some}"
            raise MismatchError(self.path, summary, problems, advice)

    def _dtype(self, name: str, spec: TensorSpec) -> torch.dtype:
        """That of all its parts, or one that holds the values of all of them."""
        if name in self._made:
            return self._made[name].dtype
        links = self._translation.links_from(name, Chunk.whole(spec.shape))
        dtypes = [self._files.specs[self._stored[link.name]].dtype for link in links]
        return functools.reduce(torch.promote_types, dtypes) if dtypes else spec.dtype
