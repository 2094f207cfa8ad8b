"""Stop a process with SIGSTOP and wait until it has stopped: the signal is sent before it is obeyed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def stop_process(process: int) -> None:
    """Stop all threads of the process; return when each of them stands still."""
    os.kill(process, signal.SIGSTOP)
    while not all(_state(thread) == "T" for thread in Path(f"/proc/{process}/task").iterdir()):
        time.sleep(0.001)


def _state(thread: Path) -> str:
    return (thread / "stat").read_text().rpartition(")")[2].split()[0]
