"""Tensors whose elements stand elsewhere in a source, in another order, read box by box."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardsmith.errors import CheckpointError
from shardsmith.name_maps.grids import Grid
from shardsmith.tensors.tensors import Chunk, TensorSource


@dataclass(frozen=True, slots=True)
class Link:
    """Elements of a source's tensor ``name``, at ``here``, which are wanted at ``there`` in another. Equal shapes."""

    name: str
    here: Grid
    there: Grid


@dataclass(frozen=True, slots=True)
class _Found:
    values: Tensor
    """Of shape ``part.sizes``."""
    grid: Grid
    part: Chunk

    @property
    def place(self) -> Chunk:
        return self.grid.cover(self.part)


def read_linked(
    source: TensorSource, links: Iterable[Link], box: Chunk, dtype: torch.dtype
) -> Iterator[tuple[Chunk, Tensor]]:
    """As ``TensorSource.pieces``, for a tensor that is linked to those of a source. Reads only what the box needs.

    Parts that are boxes stay views where they can. If some are not, all of the box is put together in fresh memory.

    Raises:
        CheckpointError: the source does not have all of a box that has to be put together.
    """
    found = [part for link in links for part in _find(source, link, box)]
    # Each part fills its cover, so it is a box of the target and can be handed out as a view.
    if all(part.place.numel == part.part.numel for part in found):
        yield from ((part.place, part.grid.as_box(part.values, part.part).to(dtype)) for part in found)
    else:
        yield box, _assembled(source, found, box, dtype)


def _find(source: TensorSource, link: Link, box: Chunk) -> Iterator[_Found]:
    for wanted in link.there.cut(box):
        # The cover of a grid may have elements of other targets between its own; ``cut`` takes them out again.
        for chunk, values in source.pieces(link.name, link.here.cover(wanted)):
            for held in link.here.cut(chunk):
                part = held.intersect(wanted)
                if part is not None:
                    yield _Found(link.here.view(values, chunk, part), link.there, part)


def _assembled(source: TensorSource, found: Sequence[_Found], box: Chunk, dtype: torch.dtype) -> Tensor:
    # Parts do not overlap: the translation was verified for that.
    filled = sum(part.values.numel() for part in found)
    if filled != box.numel:
        raise CheckpointError(source.path, f"has only {filled} of {box.numel} elements of what {box} is made of")
    out = torch.empty(box.sizes, dtype=dtype, device="cpu")
    for part in found:
        part.grid.view(out, box, part.part).copy_(part.values)
    return out
