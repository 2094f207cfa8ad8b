"""Memory for staging: every limit that the system tells of is found, and what all ranks under it take is added up."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardsmith.errors import NotEnoughMemoryError, RankFailedError
from shardsmith.ground import host_memory
from shardsmith.ground.host_memory import memory_limits
from shardsmith.hooks import HFExport, ShardedSave, every
from tests.ranks import run_on_ranks

GiB, MiB = 1 << 30, 1 << 20


def kernel_files(root: Path, *, left: int, cgroup: str = "") -> Path:
    """A /proc that says how much of its 1 TiB the machine has left."""
    write(
        root / "proc",
        {
            "sys/kernel/random/boot_id": "one\n",
            "meminfo": f"MemTotal: {1 << 30} kB\nMemFree: 1 kB\nMemAvailable: {left >> 10} kB\n",
            "self/cgroup": cgroup,
        },
    )
    return root


def look_at(root: Path) -> None:
    host_memory._PROC, host_memory._CGROUPS = root / "proc", root / "cgroup"


@pytest.fixture(autouse=True)
def _real_files_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_PROC", host_memory._PROC)
    monkeypatch.setattr(host_memory, "_CGROUPS", host_memory._CGROUPS)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_this_machine_says_what_it_has() -> None:
    machine, *_ = memory_limits()
    assert 0 < machine.left <= machine.total
    assert machine.total == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_cgroup_of_version_2_and_those_above_it_limit_memory(tmp_path: Path) -> None:
    look_at(kernel_files(tmp_path, left=GiB, cgroup="0::/job/step\n"))
    write(tmp_path / "cgroup", {"memory.max": "max\n", "memory.current": "1\n", "memory.stat": "active_file 1\n"})
    stat = "anon 7\nactive_file 300\ninactive_file 40\n"
    write(tmp_path / "cgroup/job", {"memory.max": "5000\n", "memory.current": "4000\n", "memory.stat": stat})
    write(tmp_path / "cgroup/job/step", {"memory.max": "9000\n", "memory.current": "9999\n", "memory.stat": ""})
    assert [(limit.total, limit.left) for limit in memory_limits()] == [(1 << 40, GiB), (9000, 0), (5000, 1340)]


def test_so_does_one_of_version_1_also_where_its_path_is_not_there(tmp_path: Path) -> None:
    look_at(kernel_files(tmp_path, left=GiB, cgroup="5:cpu:/x\n4:memory,misc:/docker/abc\n0::/\n"))
    files = {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "4000", "memory.stat": "total_active_file 500\n"}
    write(tmp_path / "cgroup/memory", files)
    assert [(limit.total, limit.left) for limit in memory_limits()] == [(1 << 40, GiB), (5000, 1500)]
    (tmp_path / "cgroup/memory/memory.limit_in_bytes").write_text(f"{(1 << 63) - 4096}")
    assert len(memory_limits()) == 1


def test_a_system_that_says_nothing_limits_nothing(tmp_path: Path) -> None:
    look_at(tmp_path)
    assert memory_limits() == []


def test_a_save_and_an_export_without_room_are_refused_with_figures_on_all_ranks(tmp_path: Path) -> None:
    run_on_ranks(run_without_room, 2, tmp_path, tmp_path)


def run_without_room(directory: Path) -> None:
    """Each rank alone would have room for its 2 MiB and what it takes beside; the two together have not."""
    logging.disable()
    rank = dist.get_rank()
    kernel_files(directory / f"host-{rank}", left=40 * MiB)
    look_at(directory / f"host-{rank}")
    model = nn.Linear(1024, 1024)
    fully_shard(model)
    save = ShardedSave(directory / "steps", model=model, when=every(1))
    export = HFExport(directory / "hf", model=model, when=every(1))
    for act, name in ((save.save, "step-1"), (export.export, "step-1")):
        with pytest.raises(RankFailedError) as error:
            act(1)
        text = str(error.value)
        assert f"staging {name}: too little memory" in text
        figures = r"2 ranks need (71\.\d+|69\.\d+) MB more, and 41\.94 MB of the 1099\.51 GB of the machine are left"
        assert re.search(figures, text), text
        assert "async_mode" in text
    (directory / f"host-{rank}/proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {GiB >> 10} kB\n")
    save.save(2)
    export.export(2)
    save.close()
    export.close()
    assert (directory / "steps/step-2").is_dir()
    assert (directory / "hf/step-2").is_dir()
    dist.barrier()


def test_one_rank_alone_hears_the_error_itself(tmp_path: Path) -> None:
    look_at(kernel_files(tmp_path, left=MiB))
    save = ShardedSave(tmp_path / "steps", model=nn.Linear(4, 4), when=every(1))
    with pytest.raises(NotEnoughMemoryError, match=r"1 ranks need 33\.56 MB more, and 1\.05 MB"):
        save.save(1)
    assert not any((tmp_path / "steps").iterdir())
    save.close()
