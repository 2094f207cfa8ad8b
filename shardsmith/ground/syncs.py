"""Which rank of a host opens a file that several of its ranks write to, and which one makes it durable: one each.

``fsync`` writes what all processes of the host have put into the file, as long as they use one cache: one kernel, and
one mount of the file system. What neighbours write becomes large requests there, however small the boxes are.
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


def deal_addresses(said: Sequence[tuple[str, str]]) -> list[list[str]]:
    """For each rank the addresses of all ranks with its cache, in their order, with its own.

    Args:
        said: Of each rank its cache, and where it lends open files. These are of no use outside the host.
    """
    alike: dict[str, list[str]] = {}
    for cache, address in said:
        alike.setdefault(cache, []).append(address)
    return [alike[cache] for cache, _ in said]


def lender_of(file: int, addresses: Sequence[str]) -> str:
    """Return the address of the rank that opens the file of this number for its host."""
    # By the number of the file, so that the files are spread over a host's ranks.
    return addresses[file % len(addresses)]
