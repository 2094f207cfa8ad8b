"""One rank of a host makes a weight file of a save durable, for all that have written to it there, when all have."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shardsmith.formats.safetensors_files import host_files
from shardsmith.hooks import EMA, ShardedSave, at
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from shardsmith.run_state import weights_write
from tests.ground.counted_stores import Counted
from tests.ranks import error_of_all, run_on_ranks

RANKS = 4
Hosts = Literal["one host", "two hosts", "a host each"]
HOST_OF: dict[Hosts, Any] = {"one host": lambda _: 0, "two hosts": lambda rank: rank // 2, "a host each": lambda r: r}


class Disk:
    """Notes what this process does to weight files: the call, the file in its step, and when."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, int]] = []
        self.broken = ""
        """Part of the path of files whose fsync fails."""
        open_file, pwrite, fsync = os.open, os.pwrite, os.fsync

        def noted_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if flags & os.O_ACCMODE == os.O_RDWR:  # else it is read: hashed, or compared with the plan
                self.note("open", os.fspath(path))
            return open_file(path, flags, *args, **options)

        def noted_pwrite(descriptor: int, *args: Any) -> int:
            self.note("write", os.readlink(f"/proc/self/fd/{descriptor}"))
            return pwrite(descriptor, *args)

        def noted_fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self.note("fsync", path)
            if self.broken and self.broken in path:
                raise OSError(5, "Input/output error")
            fsync(descriptor)

        os.open, os.pwrite, os.fsync = noted_open, noted_pwrite, noted_fsync

    def note(self, call: str, path: str) -> None:
        if ".tmp-" in path and path.endswith(".safetensors"):
            # The clock is the same one in all processes.
            self.calls.append((call, path.partition(".tmp-")[2].partition("/")[2], time.monotonic_ns()))


def model_of(seed: int, sharding: str) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=i == 0) for i in range(12)))
    if sharding != "none":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")) if sharding == "hsdp" else None
        fully_shard(model, mesh=mesh)
    return model


def saver(directory: Path, model: nn.Module, **options: Any) -> ShardedSave:
    average = EMA(model, decay=0.5)
    given = {"weights": "huggingface", "max_shard_size": "600B", "async_mode": "disabled", **options}
    return ShardedSave(directory, model=model, ema=average, when=at(10**9), **given)


def run_saves(hosts: Hosts, sharding: str, many: int, most_open: int, directory: Path, options: dict[str, Any]) -> None:
    rank = dist.get_rank()
    host_files._MANY_OPENS, host_files._most_open = many, lambda: most_open
    weights_write.cache_of = lambda *_: f"{HOST_OF[hosts](rank)}"
    disk, model = Disk(), model_of(7, sharding)
    save = saver(directory, model, **options)
    said = Counter[str]()
    save._ranks._store = Counted(save._ranks._store, said)
    for step in (1, 2):
        disk.calls.clear()
        said.clear()
        save.save(step)
        save.saving(step).result()
        everywhere: list[Any] = [None] * RANKS
        dist.all_gather_object(everywhere, (disk.calls, dict(said)))
        calls, operations = zip(*everywhere, strict=True)
        place = directory / f"step-{step}"
        assert_each_file_is_durable(place, [HOST_OF[hosts](i) for i in range(RANKS)], calls, many == 1, most_open)
        if rank == 0:
            assert find_damage(place) == []
        if step == 2 and many > 1:
            assert_nothing_is_said_for_it(hosts, operations)
    save.close()


def assert_each_file_is_durable(
    place: Path, host_of: list[int], calls: tuple[list[tuple[str, str, int]], ...], lent: bool, most_open: int
) -> None:
    files = [str(path.relative_to(place)) for path in place.rglob("*.safetensors") if "exceptions" not in path.name]
    assert len(files) > 6
    for file in files:
        own = [[(call, at) for call, name, at in of_rank if name == file] for of_rank in calls]
        for host in {*host_of}:
            here = [own[i] for i in range(RANKS) if host_of[i] == host]
            written = [at for of_rank in here for call, at in of_rank if call == "write"]
            synced = [at for of_rank in here for call, at in of_rank if call == "fsync"]
            opened = sum(call == "open" for of_rank in here for call, _ in of_rank)
            if written:
                assert max(synced) > max(written)
            if most_open > len(files):
                assert len(synced) == (1 if written else 0)
                # On the host of rank 0, which has made the file, it may be another one that lends it.
                assert opened <= ((2 if host == host_of[0] else 1) if lent else len(here))


def assert_nothing_is_said_for_it(hosts: Hosts, operations: tuple[dict[str, int], ...]) -> None:
    """Of a later save: collecting, making files, writing, hashing, committing, as before files were dealt out."""
    exchanges = 1 if hosts == "two hosts" else 0  # a rank reads what another host has written when it is durable
    for rank, said in enumerate(operations):
        assert said["set"] == (5 if rank == 0 else 3) + exchanges
        assert said.get("get", 0) == (0 if rank == 0 else 5 + exchanges)


@pytest.mark.parametrize("hosts", HOST_OF)
@pytest.mark.parametrize(
    ("sharding", "many", "most_open", "options"),
    [
        pytest.param("fsdp2", 1 << 30, 999, {}, id="each rank opens files"),
        pytest.param("fsdp2", 1, 999, {"weights_dtype": "bfloat16"}, id="a rank opens files for its host, rounded"),
        pytest.param("hsdp", 1, 999, {"async_mode": "async"}, id="a rank opens files for its host, replicas"),
        pytest.param("fsdp2", 1, 3, {"weights_dtype": "bfloat16"}, id="too many to stay open"),
    ],
)
def test_each_file_is_durable_when_all_have_written(
    hosts: Hosts, sharding: str, many: int, most_open: int, options: dict[str, Any], tmp_path: Path
) -> None:
    run_on_ranks(run_saves, RANKS, tmp_path, hosts, sharding, many, most_open, tmp_path / "run", options)
    alone = saver(tmp_path / "alone", model_of(7, "none"), **options)
    alone.save(1)
    alone.close()
    for path in (tmp_path / "alone" / "step-1").rglob("*.safetensors"):
        if "exceptions" not in path.name:
            saved = tmp_path / "run" / "step-2" / path.relative_to(tmp_path / "alone" / "step-1")
            assert saved.read_bytes() == path.read_bytes(), path
            assert load_file(saved)


def run_with_errors(hosts: Hosts, many: int, directory: Path) -> None:
    logging.disable()  # the errors are meant to happen
    rank = dist.get_rank()
    host_files._MANY_OPENS = many
    disk, model = Disk(), model_of(7, "fsdp2")
    save = saver(directory, model)
    fault = ""

    def cache_of(*_: Any) -> str:
        if fault == "cache" and rank == RANKS - 1:
            raise OSError(5, "Input/output error")
        return f"{HOST_OF[hosts](rank)}"

    create = host_files.HostFiles.create

    def failing_create(files: host_files.HostFiles) -> None:
        create(files)
        if fault == "create":
            raise OSError(5, "Input/output error")

    weights_write.cache_of = cache_of  # type: ignore[assignment]
    host_files.HostFiles.create = failing_create  # type: ignore[assignment,method-assign]
    step = 0
    for culprit, kind in [(RANKS - 1, "cache"), (0, "create"), *((rank, "fsync") for rank in range(RANKS))]:
        step += 1
        # The first save agrees on who does what; of later ones only those that lend files do.
        fault, disk.broken = kind, "/ema/model" if kind == "fsync" and rank == culprit else ""
        text = error_of_all(partial(save.save, step))
        assert f"writing step-{step} failed on " in text
        assert f"rank {culprit}: " in text
        assert "Input/output error" in text
        assert committed_steps(directory) == [*range(1, step)]
        fault, disk.broken = "", ""
        dist.barrier()
        assert not [path for path in directory.iterdir() if ".tmp-" in path.name]
        save.save(step)
        assert open_weight_files() == []
    save.close()
    dist.barrier()
    assert committed_steps(directory) == [*range(1, step + 1)]
    assert find_damage(directory / f"step-{step}") == []


def open_weight_files() -> list[str]:
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # it was that of the listing, or of another thread
            paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [path for path in paths if path.endswith(".safetensors")]


@pytest.mark.parametrize("many", [1, 1 << 30], ids=["lent", "opened by each"])
@pytest.mark.parametrize("hosts", HOST_OF)
def test_an_error_on_one_rank_is_known_on_all_and_costs_only_that_save(hosts: Hosts, many: int, tmp_path: Path) -> None:
    run_on_ranks(run_with_errors, RANKS, tmp_path, hosts, many, tmp_path / "run")
