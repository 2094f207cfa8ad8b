"""Every byte of an export is written exactly once, whoever holds it."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from shardsmith.hooks import EMA, HFExport, at
from tests.hooks.live_models import Case, build, shard
from tests.ranks import run_on_ranks

Writes = dict[str, list[tuple[int, int]]]
"""By file: first byte and number of bytes of each write."""

CASES = [
    *(Case(kind="odd", sharding=sharding, ranks=2) for sharding in ("ddp", "tp", "fsdp1", "fsdp2")),
    *(Case(kind="odd", sharding=sharding, ranks=4) for sharding in ("ddp", "hsdp", "fsdp1-hybrid", "tp-fsdp2")),
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_byte_is_written_twice_or_by_nobody(ranks: int, tmp_path: Path) -> None:
    run_on_ranks(run_counted, ranks, tmp_path, [case for case in CASES if case.ranks == ranks], tmp_path)


def run_counted(cases: list[Case], directory: Path) -> None:
    for case in cases:
        model = shard(build(case), case.sharding)
        ema = EMA(model)
        for mode in ("slices", "files"):
            place = directory / f"{case}-{mode}"
            export = HFExport(place, model=model, ema=ema, when=at(1), write_mode=mode, max_shard_size="1KB")
            mine = export_and_count(export)
            everyone: list[Any] = [None] * case.ranks
            dist.all_gather_object(everyone, mine)
            check(place / "step-1", everyone, mode)


def export_and_count(export: HFExport) -> Writes:
    """What this process writes with ``pwrite``, which is how weights are written."""
    writes: Writes = defaultdict(list)
    pwrite = os.pwrite

    def counting(descriptor: int, data: Any, offset: int) -> int:
        written = pwrite(descriptor, data, offset)
        writes[Path(os.readlink(f"/proc/self/fd/{descriptor}")).name].append((offset, written))
        return written

    os.pwrite = counting  # type: ignore[assignment]
    try:
        export.export(1)
        export.close()
    finally:
        os.pwrite = pwrite
    return dict(writes)


def check(directory: Path, everyone: list[Writes], mode: str) -> None:
    files = {path.name: path.stat().st_size for path in directory.glob("*.safetensors")}
    assert len(files) > 4
    for name, size in files.items():
        writers = [writes[name] for writes in everyone if name in writes]
        end = 0
        for offset, count in sorted(write for writes in writers for write in writes):
            assert offset == end, f"{name}: written up to {end}, then from {offset} on"
            end += count
        assert end == size
        assert mode == "slices" or len(writers) == 1
    assert mode == "files" or sum(bool(writes) for writes in everyone) == len(everyone)
