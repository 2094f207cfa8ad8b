"""How all ranks write the weight files of one save together.

make       rank 0 makes them; at first all ranks also say to which they will write, and which cache they write through
write      every rank writes its boxes
finish     one rank of each host makes a file durable for all of them; then each file is hashed by one rank
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from shardsmith.formats.dcp.rank_file import Piece
from shardsmith.formats.safetensors_files.host_files import HostFiles
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.syncs import cache_of, deal_addresses, deal_syncs
from shardsmith.manifest.metadata import FileRecord
from shardsmith.run_state.weight_files import WeightFiles, Written
from shardsmith.sharding.holding import pack_flags, unpack_flags


@dataclass(frozen=True, slots=True)
class HostPart:
    """What ranks of one host do for each other, agreed once, as who writes what is."""

    files: Sequence[tuple[str, bytes]]
    """Names and headers of all files."""
    syncs: Sequence[int]
    """Of these files, those that this rank makes durable when all have written."""
    caches: int
    """How many there are among all ranks."""

    def is_of(self, weights: WeightFiles) -> bool:
        """Whether these are the files that it was agreed for."""
        return self.files == _described(weights)


class WeightsWrite:
    """The weight files of one save while they are written. Make it on every rank; then, within a ``with``, all of it.

    Without weight files it does nothing. Any thread.

    Attributes:
        part: What this rank does for its host, once it is agreed.
    """

    def __init__(
        self, weights: WeightFiles, ranks: Ranks, directory: Path, phase: str, part: HostPart | None = None
    ) -> None:
        """Nothing is done yet.

        Args:
            weights: What is written.
            ranks: Those that save.
            directory: That of the attempt.
            phase: For error messages.
            part: Of the save before this one, if all ranks know theirs, and write the same as then.
        """
        self.part = part
        self._weights = weights
        self._ranks = ranks
        self._phase = phase
        self._directory = directory
        self._files = HostFiles(directory, weights.files)

    def make(self, pieces: Sequence[Piece]) -> None:
        """Make the files on rank 0, at their full size, and agree on who does what for a host. Communicates.

        Args:
            pieces: What this rank writes.

        Raises:
            RankFailedError: on all ranks, if it failed on any.
        """
        if not self._weights.files:
            return
        # All the same on all ranks. Open files are lent anew by each save.
        is_lent = self._files.are_many(self._ranks.size) and (self.part is None or self._is_shared)
        if self.part is not None and not is_lent:
            self._ranks.lead(self._phase, self._files.create)
            return
        answer = self._ranks.deal(self._phase, lambda: self._say(pieces, is_lent), self._make_and_deal, large=True)
        self.part = HostPart(_described(self._weights), answer["syncs"], answer["caches"])
        self._files.borrow_from(answer["addresses"])

    def write(self, pieces: Sequence[Piece], values: Iterator[Tensor]) -> Written:
        """Write this rank's pieces. No communication; arguments as of ``WeightFiles.write``. Raises WriteError."""
        found = self._weights.write(pieces, values, self._files, self._directory, self._ranks.rank)
        unsynced = self._files.unsynced()
        # Where each rank has a cache of its own, there is nobody to wait for.
        if not self._is_shared:
            self._files.sync(unsynced)
        return found

    def finish(self) -> dict[str, FileRecord]:
        """Make all files durable and hash them, when all ranks have written. Communicates; on rank 0 all records.

        Raises:
            RankFailedError: on all ranks, if it failed on any.
        """
        if self.part is None:
            return {}
        syncs = self.part.syncs if self._is_shared else ()
        # Within one cache a rank reads what others have written before it is durable; from another host perhaps not.
        if self._is_shared and self.part.caches > 1:
            mine, syncs = syncs, ()
            self._ranks.gather(self._phase, lambda: self._files.sync(mine))
        records = self._ranks.gather(self._phase, lambda: self._hash(syncs), large=True)
        return {name: FileRecord(**record) for of_rank in records for name, record in of_rank.items()}

    @property
    def _is_shared(self) -> bool:
        """Whether ranks write through one cache, where one of them makes a file durable after all have written."""
        return self.part is not None and self.part.caches < self._ranks.size

    def _say(self, pieces: Sequence[Piece], is_lent: bool) -> list[Any]:
        """Whom this rank shares a cache with, where it lends files, and to which files it writes."""
        flags = np.zeros(len(self._weights.files), dtype=bool)
        # Rank 0 makes all of them, which is to be durable, too.
        flags[[*self._weights.numbers_of(pieces)] if self._ranks.rank else slice(None)] = True
        # The attempt may be too new for another host to see it.
        cache = cache_of(self._directory.parent, self._ranks.rank)
        return [cache, self._files.lend() if is_lent else "", pack_flags(flags)]

    def _make_and_deal(self, said: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
        self._files.create()
        caches, addresses, packed = zip(*said, strict=True)
        flags = (unpack_flags(one, len(self._weights.files)) for one in packed)
        syncs = deal_syncs([(cache, np.flatnonzero(own).tolist()) for cache, own in zip(caches, flags, strict=True)])
        lenders = deal_addresses([*zip(caches, addresses, strict=True)])
        return [
            {"syncs": mine, "addresses": own if any(own) else [], "caches": len({*caches})}
            for mine, own in zip(syncs, lenders, strict=True)
        ]

    def _hash(self, syncs: Sequence[int]) -> dict[str, Any]:
        self._files.sync(syncs)
        records = self._weights.hash_files(self._directory, self._ranks.rank, self._ranks.size)
        return {name: asdict(record) for name, record in records.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.close()


def _described(weights: WeightFiles) -> list[tuple[str, bytes]]:
    # A header says what lies where.
    return [(file.name, file.header) for file in weights.files]
