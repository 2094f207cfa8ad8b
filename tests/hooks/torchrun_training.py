"""``torchrun -m tests.hooks.torchrun_training DIRECTORY``: trains until it is told to end."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from shardsmith.ground.process_end import finish
from tests.hooks.training import run_training

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    step = run_training(Path(sys.argv[1]), 10**6)
    sys.stdout.write(f"stopped after step {step}\n")  # at once: unbuffered, print writes the end of a line apart
    sys.stdout.flush()
    finish()
