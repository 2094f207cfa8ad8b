"""A run whose weights are the number of the step: saved every second step, and exported in both ways of writing.

python two_hosts_run.py FOLDER STEPS [KIND STEP RANK]: with the latter, a rank stops for ever where it is about to write
its part of that step's checkpoint or export, and says so by a file ``FOLDER/stopped``.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardsmith.errors import ShardsmithError
from shardsmith.hooks import HFExport, Hooks, ShardedSave, every, finish, latest


def stop_at(folder: Path, kind: str, step: int) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and f"/{kind}/.step-{step}.tmp-" in str(Path(str(arguments[0])).parent):
            (folder / "stopped").touch()
            threading.Event().wait()

    sys.addaudithook(hook)


def train(folder: Path, steps: int) -> None:
    model = nn.Sequential(nn.Linear(300, 301, bias=False), nn.Linear(301, 7, bias=False))
    fully_shard(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options: dict[str, Any] = {"model": model, "when": every(2), "timeout_secs": 5}
    save = ShardedSave(folder / "steps", optimizer=optimizer, keep=latest(2), **options)
    options |= {"dtype": "original", "max_shard_size": "200KB"}
    exports = [HFExport(folder / mode, write_mode=mode, **options) for mode in ("slices", "files")]
    with Hooks(save, *exports) as hooks:
        step = hooks.resume()
        (folder / f"resumed-{dist.get_rank()}").write_text(str(step))
        while step < steps:
            model(torch.ones(1, 300)).sum().backward()
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, -1.0)
            optimizer.step()
            step += 1
            hooks.step(step)


def main(folder: Path, steps: int, stop: list[str]) -> None:
    faulthandler.dump_traceback_later(100, exit=True)
    logging.disable()
    rank = int(os.environ["RANK"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # the other host may take its time to start, but not to answer once it has
    store = dist.TCPStore(address, port, 2, is_master=rank == 0, timeout=timedelta(seconds=90))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=10))
    if stop and rank == int(stop[2]):
        stop_at(folder, stop[0], int(stop[1]))
    try:
        train(folder, steps)
    except ShardsmithError as error:
        (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise
    finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
