"""A rank is killed at every point of an export: nothing torn is ever seen, and the next run sweeps up and exports."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardsmith.ground.layout import is_leftover
from shardsmith.hooks import EMA, HFExport, every
from tests.hooks.killed_runs import RANKS, KilledRun, Server

pytestmark = pytest.mark.long


@dataclass(frozen=True, kw_only=True)
class Run(KilledRun):
    """Exports a model and its average, in a file each."""

    mode: Literal["slices", "files"]

    def train(self) -> None:
        model = build()
        fully_shard(model)
        export(self.directory, model, self.mode)


def build() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8))


def export(directory: Path, model: nn.Module, mode: Literal["slices", "files"]) -> None:
    hook = HFExport(directory, model=model, ema=EMA(model), when=every(1), dtype="original", write_mode=mode)
    hook.on_step_end(1)
    hook.close()


def assert_whole(directory: Path) -> None:
    expected = build().state_dict()
    for stem in ("model", "ema"):
        found = load_file(directory / f"{stem}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (directory / "shardsmith.json").read_text().endswith("}\n")


@pytest.mark.parametrize("mode", ["slices", "files"])
@pytest.mark.parametrize("victim", range(RANKS))
def test_a_kill_at_any_point_of_an_export_leaves_nothing_torn_and_the_next_run_exports(
    server: Server, tmp_path: Path, mode: Literal["slices", "files"], victim: int
) -> None:
    run = Run(directory=tmp_path / "count", mode=mode, victim=victim)
    assert server.run(run) == [0, 0], run.beside("rank-0.log").read_text()
    events = run.events()
    first = next(i for i, line in enumerate(events) if "/.step-1.tmp" in line)  # what is before is done at each start
    assert len(events) > first
    for point in range(first, len(events)):
        run = Run(directory=tmp_path / f"run-{point}", mode=mode, victim=victim, point=point)
        assert server.run(run)[victim] == -signal.SIGKILL
        renamed = any(line.startswith("os.rename ") for line in run.events()[:-1] if line.endswith(" /step-1"))
        seen = [path.name for path in run.directory.iterdir() if not is_leftover(path.name)]
        assert seen == ["step-1"] if renamed else victim or seen == []
        if seen:
            assert_whole(run.directory / "step-1")
        export(run.directory, build(), mode)  # the next run, with another number of ranks
        assert [path.name for path in run.directory.iterdir()] == ["step-1"]
        assert_whole(run.directory / "step-1")
        shutil.rmtree(run.directory)
