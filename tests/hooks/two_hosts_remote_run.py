"""One rank of a run that saves and exports to an object store, with a cache on the disk of its host.

python two_hosts_remote_run.py PLACE DISK STEPS, with the variables that torchrun sets
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from shardsmith.ground.remote_path import as_path
from shardsmith.hooks import finish
from tests.hooks.training import run_training


def main(place: str, disk: Path, steps: int) -> None:
    torch.set_num_threads(1)
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, 2, is_master=rank == 0, timeout=timedelta(seconds=90))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    run_training(as_path(f"{place}/steps"), steps, export_to=as_path(f"{place}/hf"), local_cache=disk)
    finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
