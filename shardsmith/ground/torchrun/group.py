"""The ranks of a command that may have been started by torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist

from shardsmith.ground.process_end import finish
from shardsmith.ground.ranks import Ranks


@contextlib.contextmanager
def joined_ranks(timeout_secs: float = 1800.0) -> Iterator[Ranks]:
    """Within it this process is one of the ranks that torchrun started, or the only one.

    A process group (Gloo) is made and in the end taken down, unless there is one already.
    """
    starts = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if starts:
        # Gloo needs no accelerator; what commands exchange lies in the host's memory.
        dist.init_process_group("gloo")
    try:
        yield Ranks(timeout_secs)
    except BaseException:
        if starts:  # the other ranks may not get to the end
            dist.destroy_process_group()
        raise
    # On success only: `finish` waits for all ranks.
    if starts:
        finish()
