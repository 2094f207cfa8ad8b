"""Which safetensors files a set of tensors becomes: their names, headers and sizes, before a byte is written.

Names, shapes and dtypes decide where every element lies, so nobody has to hold a whole tensor or wait for another.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from shardsmith.errors import UsageError
from shardsmith.formats.safetensors_files.header import TensorPlacement, build_header, place_tensors
from shardsmith.ground.layout import MAIN_WEIGHTS, shard_file_names
from shardsmith.tensors.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file to be: its name, its first bytes, and where each tensor goes."""

    name: str
    header: bytes
    tensors: dict[str, TensorPlacement]

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return max((tensor.end for tensor in self.tensors.values()), default=len(self.header))


@dataclass(frozen=True, slots=True)
class WeightsPlan:
    """The files that hold a set of tensors, and the content of the index that goes with several of them."""

    files: tuple[FilePlan, ...]
    index: dict[str, Any] | None


def plan_files(
    specs: Iterable[TensorSpec], stem: str = MAIN_WEIGHTS, max_shard_bytes: int | None = None
) -> WeightsPlan:
    """Plan one file, or as few as ``max_shard_bytes`` allows, with an index.

    Args:
        specs: In the order in which shards are filled; each shard takes neighbours.
        stem: Stem of the names of files, such as ``"model"``.
        max_shard_bytes: Most bytes of tensors in a file; a tensor larger than that gets a file of its own. None: one
            file, however large.

    Raises:
        UsageError: when safetensors cannot hold the tensors, or the limit is not positive.
    """
    specs = list(specs)
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes is {max_shard_bytes}; give a positive number, or None for a single file")
    place_tensors(specs, data_begin=0)  # no name may be there twice, not even in different shards
    limit = sum(spec.nbytes for spec in specs) if max_shard_bytes is None else max_shard_bytes
    shards = list(_balanced_shards(specs, limit)) or [[]]
    names = shard_file_names(stem, len(shards))
    files = tuple(_plan_file(name, shard) for name, shard in zip(names, shards, strict=True))
    if len(files) == 1:
        return WeightsPlan(files, None)
    weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    return WeightsPlan(
        files, {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    )


def _plan_file(name: str, specs: list[TensorSpec]) -> FilePlan:
    header = build_header(specs)
    return FilePlan(name, header, place_tensors(specs, data_begin=len(header)))


def _balanced_shards(specs: list[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    """Cut into as few runs of neighbours as the limit allows, each as near to an equal share as it can be."""
    ends = [0, *itertools.accumulate(spec.nbytes for spec in specs)]
    # For each tensor the end of the longest run that begins there; a tensor over the limit is a run of its own.
    reach = [max(i + 1, bisect.bisect_right(ends, ends[i] + limit) - 1) for i in range(len(specs))]
    fewest = [0] * len(ends)  # fewest[i]: how many runs the tensors from i on need
    for i in reversed(range(len(specs))):
        fewest[i] = 1 + fewest[reach[i]]
    start = 0
    for left in range(fewest[0], 0, -1):
        # What is left, divided equally. Only cuts are considered that still allow the fewest files.
        share = ends[start] + (ends[-1] - ends[start]) / left
        stops = (stop for stop in range(start + 1, reach[start] + 1) if fewest[stop] == left - 1)
        stop = min(stops, key=lambda stop: abs(ends[stop] - share))
        yield specs[start:stop]
        start = stop
