"""Whether a machine has room for a benchmark: better told than killed by the kernel or stopped by a full disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_SPARE_MEMORY = 1 << 30
"""For everything else that runs."""


def working_directory() -> Path:
    """The system's temporary directory, or ``/var/tmp`` where that one lies in memory and this one does not."""
    usual, on_disk = Path(tempfile.gettempdir()), Path("/var/tmp")
    return on_disk if is_in_memory(usual) and on_disk.is_dir() and not is_in_memory(on_disk) else usual


def why_not(directory: Path, disk_bytes: float, memory_bytes: float) -> str | None:
    """Why so much cannot be had now, with the numbers; None if it can. Files on tmpfs count as memory."""
    if is_in_memory(directory):
        # There both are taken from one store.
        memory_bytes += disk_bytes
    status = os.statvfs(directory)
    needs = (("disk", disk_bytes, status.f_bavail * status.f_frsize), ("memory", memory_bytes, _available_memory()))
    lacks = [
        f"needs about {wanted / 1e9:.1f} GB of {what}, of which {there / 1e9:.1f} GB are free"
        for what, wanted, there in needs
        if wanted > there
    ]
    return "; ".join(lacks) or None


def forget_cached(directory: Path) -> None:
    """Drop files from the page cache, so that whoever comes next finds them as cold as the one before did."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            # Dirty pages cannot be dropped, so they are written first.
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def is_in_memory(directory: Path) -> bool:
    """Whether a directory lies on a file system that has no disk."""
    place = os.path.realpath(directory)
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    # The mount with the longest path is the one that holds the directory.
    around = [(len(mount[1]), mount[2]) for mount in mounts if f"{place}/".startswith(f"{mount[1].rstrip('/')}/")]
    return max(around, default=(0, ""))[1] in ("tmpfs", "ramfs")


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return available - _SPARE_MEMORY
