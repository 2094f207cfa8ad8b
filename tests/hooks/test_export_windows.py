"""Exports with ``max_host_memory`` hold the same bytes, in bounded memory, and leave nobody waiting when they fail."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardsmith.errors import CorruptCheckpointError, RankFailedError, UsageError
from shardsmith.export.live_writers import SliceWriter
from shardsmith.ground.layout import PROVENANCE_FILE
from shardsmith.hooks import EMA, HFExport, Hooks, at, every
from shardsmith.manifest.checkpoints import committed_steps
from tests.hooks.test_export_rearranged import Model, Rearranged
from tests.hooks.training import build
from tests.ranks import run_on_ranks

WAYS: dict[str, dict[str, Any]] = {
    "elements": {"max_host_memory": 100},
    "tensors": {"max_host_memory": "8kB"},
    "overlap": {"max_host_memory": "8kB", "staging": "overlap"},
    "enough": {"max_host_memory": "1GB"},
}
"""The bound is below the size of most tensors, of few, or of none."""


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.suffix == ".safetensors"
    }


def run_exports(directory: Path, sharding: str, ema_as: str) -> None:
    """The same run exported in all ways; two steps in a row, so that two exports are on their way."""
    model = build(sharding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = EMA(model, decay=0.9)
    options: dict[str, Any] = {"model": model, "ema": ema, "when": at(2, 3), "ema_as": ema_as, "max_shard_size": "1kB"}
    ways = {"whole": {}, **WAYS}
    hooks = Hooks(ema, *(HFExport(directory / name, **options, **ways[name]) for name in ways))
    for step in (1, 2, 3, 4):
        nn.functional.cross_entropy(model(torch.arange(8).view(2, 4)).flatten(0, 1), torch.arange(8)).backward()
        optimizer.step()
        optimizer.zero_grad()
        hooks.step(step)
    hooks.close()


@pytest.mark.parametrize(("sharding", "ema_as"), [("fsdp2", "file"), ("fsdp1", "directory"), ("ddp", "directory")])
def test_exports_in_parts_hold_the_same_bytes(tmp_path: Path, sharding: str, ema_as: str) -> None:
    run_on_ranks(run_exports, 2, tmp_path, tmp_path, sharding, ema_as)
    whole = files(tmp_path / "whole")
    assert len({name.split("/")[0] for name in whole}) == (2 if ema_as == "file" else 4)
    for name in WAYS:
        assert files(tmp_path / name) == whole


def run_rearranged(directory: Path) -> None:
    model = Model()
    for name, bound in (("whole", None), ("parts", 64)):
        export = HFExport(directory / name, model=model, when=every(1), names=Rearranged(), max_host_memory=bound)
        export.export(1)
        export.close()


def test_what_stands_in_another_order_in_the_files_comes_out_the_same(tmp_path: Path) -> None:
    run_on_ranks(run_rearranged, 2, tmp_path, tmp_path)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert files(tmp_path / "whole")


@pytest.mark.parametrize("ema_as", ["file", "directory"])
def test_all_copies_of_a_hook_together_take_no_more_than_the_bound(tmp_path: Path, ema_as: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 1), nn.Linear(1, 2000))
    ema, bound = EMA(model), 128_000
    export = HFExport(tmp_path, model=model, ema=ema, when=every(1), ema_as=ema_as, max_host_memory=bound)
    buffers = [buffer for slot in export._in_flight._free for buffer in slot]
    for step in (1, 2, 3):
        export.export(step)
    export.wait()
    taken = sum(len(one._memory) for buffer in buffers for one in (buffer, buffer.beside))
    assert 0.5 * bound < taken <= bound + 64 * 2 * len(buffers)
    export.close()


def run_failing(directory: Path) -> None:
    """A rank cannot write its second window; the directory of the average is never begun."""
    logging.disable()
    model = build("fsdp2")
    ema = EMA(model)
    export = HFExport(directory, model=model, ema=ema, when=every(1), ema_as="directory", max_host_memory="8kB")
    write, calls = SliceWriter.write, []

    def fail_at_second(self: SliceWriter, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2 and dist.get_rank() == 1:
            raise CorruptCheckpointError(directory, "does not hold what was written to it")
        return write(self, *args)

    SliceWriter.write = fail_at_second  # type: ignore[method-assign]
    export.export(1)
    with pytest.raises(RankFailedError, match="does not hold what was written"):
        export.wait()
    SliceWriter.write = write  # type: ignore[method-assign]
    export.export(2)
    export.close()
    dist.barrier()
    assert committed_steps(directory, PROVENANCE_FILE) == [2]
    assert sorted(path.name for path in directory.glob("[!.]*")) == ["step-2", "step-2-ema"]


def test_one_that_cannot_be_written_ends_and_the_next_one_works(tmp_path: Path) -> None:
    run_on_ranks(run_failing, 2, tmp_path, tmp_path / "run")


@pytest.mark.parametrize(("place", "options"), [("run", {"write_mode": "files"}), ("s3://bucket/run", {})])
def test_where_one_rank_writes_each_file_it_is_refused(tmp_path: Path, place: str, options: Any) -> None:
    directory = place if "://" in place else tmp_path / place
    with pytest.raises(UsageError, match=r'write_mode="files", and in an object store.*source="checkpoint"'):
        HFExport(directory, model=nn.Linear(2, 2), when=every(1), max_host_memory="1GB", **options)
