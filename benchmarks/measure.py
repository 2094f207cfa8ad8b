"""Time and peak anonymous memory of a process, from outside."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_SECS = 0.005


@dataclass(frozen=True)
class Measurement:
    """One run of a command."""

    seconds: float
    peak_bytes: int
    """Most anonymous memory at any moment, the command's children included."""
    cpu_seconds: float
    """Of all processors, the command's children included: what other work on the machine does not change much."""


def measure(command: Sequence[str]) -> Measurement:
    """Run a command to its end. Raises CalledProcessError if it fails."""
    began, cpu = time.perf_counter(), _cpu_seconds()
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        # Polled from outside: a contender need not know of it, and children count as well.
        peak = max(peak, sum(anonymous_bytes(pid) for pid in _family(process.pid)))
        time.sleep(_POLL_SECS)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return Measurement(seconds, peak, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    """Of the children that have ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _family(pid: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _family(int(child))


def anonymous_bytes(pid: int | str) -> int:
    """Anonymous memory of a process now; 0 if it is gone. ``"self"`` is a pid, too."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    # RssAnon alone: pages of mapped files can be dropped by the kernel at any time.
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def cpu_seconds_of(pid: int | None) -> float:
    """Processor time that a process has used until now; 0 if it is gone."""
    try:
        # Behind the name, which may hold spaces and brackets; then utime and stime are fields 11 and 12.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Peak:
    """The most anonymous memory of this process between enter and exit."""

    def __enter__(self) -> Peak:
        self.bytes = anonymous_bytes("self")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        # 5 ms apart: shorter peaks go unseen, for all contenders alike.
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes("self"))
