"""Room for what is to be staged: what all ranks of a host are about to take, compared with what the host has left.

Without it the kernel ends a process of the host when the copy is half done, with nothing that says which or why.
Limits are those of the machine (``MemAvailable``) and of each cgroup above the process, of version 1 or 2.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardsmith.errors import NotEnoughMemoryError
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.sizes import size_text

_BESIDE_BYTES = 32 << 20
"""What a rank takes beside its copy while it writes, in bytes."""
_UNLIMITED = 1 << 62  # version 1 writes a number close to 2**63
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Limit:
    """One bound on the memory that processes take together."""

    id: str
    """The same for all processes that share it, and for no others."""
    name: str
    total: int
    """Bytes."""
    left: int
    """Bytes that can still be taken; caches that the kernel would give back are counted as left."""


def require_memory(ranks: Ranks, phase: str, need: Callable[[], int]) -> None:
    """Return when every host has room for what its ranks are about to take. All ranks; communicates.

    Args:
        ranks: Of the calling thread.
        phase: What they take it for, for the error.
        need: How many bytes this rank is about to take; 0 if none.

    Raises:
        RankFailedError: on all ranks, with the figures of each host that has too little. With one rank,
            NotEnoughMemoryError.
    """
    ranks.agree(phase, lambda: _request(need()), lambda requests: _compare(phase, requests))


def memory_limits() -> list[Limit]:
    """Every limit that this process is under, as far as the system says."""
    return [*_of_machine(), *_of_cgroups()]


def _request(nbytes: int) -> list[Any]:
    # A rank that takes nothing needs no figures, but takes part in the exchange.
    if nbytes == 0:
        return [platform.node(), 0, []]
    limits = [[limit.id, limit.name, limit.total, limit.left] for limit in memory_limits()]
    return [platform.node(), nbytes + _BESIDE_BYTES, limits]


def _compare(phase: str, requests: Sequence[Any]) -> None:
    """Add up what the ranks under each limit ask for. Raises NotEnoughMemoryError."""
    wanted: dict[str, list[int]] = {}
    facts: dict[str, tuple[str, str, int, int]] = {}
    for node, nbytes, limits in requests:
        for key, name, total, left in limits:
            wanted.setdefault(key, []).append(nbytes)
            # Ranks of one host read the same limit at different moments: the smallest of what they saw counts.
            facts[key] = (node, name, total, min(left, facts[key][3] if key in facts else left))
    problems = [
        f"{node}: {len(asked)} ranks need {size_text(sum(asked))} more, and {size_text(left)} of the "
        f"{size_text(total)} of {name} are left"
        for key, (node, name, total, left) in facts.items()
        if sum(asked := wanted[key]) > left
    ]
    if problems:
        raise NotEnoughMemoryError(f"{phase}: too little memory", problems)


def _of_machine() -> Iterator[Limit]:
    with contextlib.suppress(OSError, ValueError, KeyError):
        # The kernel counts in KiB there. Host names may be the same on several machines; the id of a boot is not.
        fields = _numbers(_PROC / "meminfo")
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        yield Limit(boot, "the machine", fields["MemTotal"] << 10, fields["MemAvailable"] << 10)


def _of_cgroups() -> Iterator[Limit]:
    with contextlib.suppress(OSError):
        for line in (_PROC / "self/cgroup").read_text().splitlines():
            # hierarchy:controllers:path; version 2 has one line, without controllers.
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
                yield from _of_hierarchy(_CGROUPS / "memory", path, *names)
            elif not controllers:
                names = ("memory.max", "memory.current", ("active_file", "inactive_file"))
                yield from _of_hierarchy(_CGROUPS, path, *names)


def _of_hierarchy(root: Path, path: str, limit: str, usage: str, caches: Sequence[str]) -> Iterator[Limit]:
    """Of a cgroup and those above it. In a container the path may lead nowhere; its own cgroup is the root there."""
    group = root / path.lstrip("/")
    # The limit of every cgroup above applies as well.
    for folder in [group, *group.parents]:
        if not folder.is_relative_to(root):
            return
        with contextlib.suppress(OSError, ValueError):
            total = int((folder / limit).read_text())  # "max" is no number, and no limit
            used = int((folder / usage).read_text())
            # Cached file pages count as used, and the kernel gives them back when memory runs short.
            cached = sum(_numbers(folder / "memory.stat").get(name, 0) for name in caches)
            if total < _UNLIMITED:
                # Device and inode name the cgroup for all processes, also for those that see it under another path.
                place = os.stat(folder)
                name = f"the cgroup {path if folder == group else folder}"
                yield Limit(f"{place.st_dev}:{place.st_ino}", name, total, max(0, total - used + cached))


def _numbers(path: Path) -> dict[str, int]:
    """The first number after each name in a file of the kernel."""
    lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
