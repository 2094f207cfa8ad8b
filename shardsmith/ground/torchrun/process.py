"""Whether torchrun has started this process. Imports nothing, as the command line asks before it does anything."""

from __future__ import annotations

import os


def was_started_by_torchrun() -> bool:
    """Return whether there are several of this process that are to act together."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_other_rank() -> bool:
    """Return whether another one of them speaks for this one."""
    return was_started_by_torchrun() and int(os.environ["RANK"]) > 0
