"""Which process makes something in an object store: an object that says so, since stores have no locks."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

from shardsmith.ground.remote_path import RemotePath

ABANDONED_AFTER = timedelta(hours=24)
"""Of an attempt on another host, about which nothing else can be known: so long after its last file it is dead."""

_MOST_BYTES = 1 << 12


def put_owner(owner: RemotePath) -> None:
    """Say there that this process makes, or deletes, what the object is named for. Raises StorageError."""
    owner.store.put(owner.key, this_process())


def this_process() -> bytes:
    """Return what an owner says."""
    return json.dumps(_this_process()).encode()


def owner_lives(owner: RemotePath) -> bool | None:
    """Whether the process that makes an attempt is alive; None if it is not one of this host."""
    try:
        said = json.loads(owner.store.get(owner.key, _MOST_BYTES))  # which is no file of the step
        host, pid, started = said["host"], int(said["pid"]), said["started"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    mine = _this_process()
    # Numbers of processes mean nothing on another host, after another boot, or in another container.
    if not mine["host"] or host != mine["host"]:
        return None
    if pid == mine["pid"]:
        return False  # it would be in _alive
    # The system uses numbers again: the same number with another start is another process.
    return _start_of(pid) == str(started)


def _this_process() -> dict[str, str | int]:
    return {"host": _host(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def _host() -> str:
    """This boot of this machine, and which numbers of processes are meant; "" if that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The id of the namespace: containers on one machine count their processes from 1 each.
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a process was started, in ticks since the boot; "" if there is none."""
    try:
        # The program's name, in parentheses, may have blanks: fields count after it. Index 19 is field 22 of proc(5).
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
