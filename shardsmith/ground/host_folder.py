"""A folder on each host's own disk: which ranks see the same one, found out by what they see and not by host names."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from shardsmith.errors import UsageError
from shardsmith.ground.commit import writing
from shardsmith.ground.layout import new_attempt_id
from shardsmith.ground.ranks import Ranks

_PROBE = re.compile(r"\.probe-(?P<name>[0-9a-f]{16})-[0-9]+")


class HostFolder:
    """One path on all ranks, which may be another folder on each host.

    Attributes:
        path: The folder.
        ranks_here: The ranks that see the folder of this one, ascending.
        count: How many folders there are in all.
    """

    def __init__(self, path: Path, ranks: Ranks) -> None:
        """Make the folder if it is missing, and find out who shares it. All ranks; communicates.

        What a process that was killed at this moment has left there is deleted.

        Raises:
            RankFailedError, WriteError: a rank cannot write there.
            UsageError: another job does the same there at this moment.
        """
        self.path = path
        self._rank = ranks.rank
        phase = "finding out which ranks share a disk"
        # A name for this look: what other jobs put there at the same time is not counted.
        name = ranks.lead(phase, new_attempt_id)
        probe = path / f".probe-{name}-{ranks.rank}"
        try:
            # Every rank has made its file before one looks: `gather` ends when all have come.
            ranks.gather(phase, lambda: _touch(probe))
            seen = ranks.agree(phase, lambda: _seen(path, f".probe-{name}-"), _sorted_groups)
            self.ranks_here: list[int] = next((group for group in seen if ranks.rank in group), [])
            self.count = len(seen)
            ranks.gather(phase, lambda: self._tidy(name))  # all have looked
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def _tidy(self, name: str) -> None:
        # This rank's own file is gone: the tidying of another job took it.
        if not self.ranks_here:
            raise UsageError(f"{self.path}: another job begins there at this moment: give each job a folder of its own")
        # What killed looks have left; of this look each rank deletes its own.
        for other in self.path.iterdir() if self.is_leader else ():
            if (probe := _PROBE.fullmatch(other.name)) and probe["name"] != name:
                other.unlink(missing_ok=True)

    @property
    def is_leader(self) -> bool:
        """Whether this rank makes, renames and deletes directories in its folder; rank 0 does in its own."""
        return self._rank == self.ranks_here[0]


def _touch(probe: Path) -> None:
    with writing(probe, "a first file"):
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()


def _seen(path: Path, prefix: str) -> list[int]:
    names = (entry.name for entry in path.iterdir())
    return sorted(int(name.removeprefix(prefix)) for name in names if name.startswith(prefix))


def _sorted_groups(seen: Sequence[list[int]]) -> list[list[int]]:
    # Ranks that share a folder have seen the same list; one of each is kept.
    return sorted({tuple(group): group for group in seen}.values())
