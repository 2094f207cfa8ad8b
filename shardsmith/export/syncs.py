"""Which rank makes a file durable that several ranks of a host have written to: one for each host and file.

``fsync`` writes what all processes of the host have put into the file, as long as they use one cache: one kernel, and
one mount of the file system.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def cache_of(directory: Path, rank: int) -> str:
    """Return what is equal for ranks that write to a directory through one cache; of this rank only, if unknown."""
    try:
        boot = _BOOT.read_text().strip()
    except OSError:
        boot = f"rank {rank}"
    # The boot id tells kernels apart, also of containers with one name; the device tells mounts apart.
    return f"{boot} {platform.node()} {os.stat(directory).st_dev}"


def deal_syncs(said: Sequence[tuple[str, Sequence[int]]]) -> list[list[int]]:
    """For each rank the files that it is to make durable.

    Args:
        said: Of each rank its cache, and the numbers of the files that it has written to.
    """
    writers: dict[tuple[str, int], list[int]] = {}
    for rank, (cache, files) in enumerate(said):
        for file in files:
            writers.setdefault((cache, file), []).append(rank)
    mine: list[list[int]] = [[] for _ in said]
    for (_, file), ranks in writers.items():
        # By the number of the file, so that the files are spread over a host's ranks.
        mine[ranks[file % len(ranks)]].append(file)
    return mine
