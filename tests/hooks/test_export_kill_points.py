"""A rank is killed at every point of an export: nothing torn is ever seen, and the next run sweeps up and exports."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    options: dict[str, Any]

    def train(self) -> None:
        model = build()
        fully_shard(model)
        export(self.directory, model, self.options)


def build() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8))


def export(directory: Path, model: nn.Module, options: dict[str, Any]) -> None:
    hook = HFExport(directory, model=model, ema=EMA(model), when=every(1), dtype="original", **options)
    hook.on_step_end(1)
    hook.close()


def assert_whole(directory: Path) -> None:
    expected = build().state_dict()
    for stem in ("model", "ema"):
        found = load_file(directory / f"{stem}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (directory / "shardsmith.json").read_text().endswith("}\n")


# the options, and which share of the points is tried
@pytest.mark.parametrize(
    ("options", "every_nth"),
    [
        ({"write_mode": "slices"}, 1),
        ({"write_mode": "files"}, 1),
        ({"staging": "overlap"}, 3),
        ({"max_host_memory": 512}, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("victim", range(RANKS))
def test_a_kill_at_any_point_of_an_export_leaves_nothing_torn_and_the_next_run_exports(
    server: Server, tmp_path: Path, options: dict[str, Any], every_nth: int, victim: int
) -> None:
    run = Run(directory=tmp_path / "count", options=options, victim=victim)
    assert server.run(run) == [0, 0], run.beside("rank-0.log").read_text()
    events = run.events()
    first = next(i for i, line in enumerate(events) if "/.step-1.tmp" in line)  # what is before is done at each start
    assert len(events) > first
    for point in range(first, len(events), every_nth):
        run = Run(directory=tmp_path / f"run-{point}", options=options, victim=victim, point=point)
        assert server.run(run)[victim] == -signal.SIGKILL
        renamed = any(line.startswith("os.rename ") for line in run.events()[:-1] if line.endswith(" /step-1"))
        seen = [path.name for path in run.directory.iterdir() if not is_leftover(path.name)]
        assert seen == ["step-1"] if renamed else victim or seen == []
        if seen:
            assert_whole(run.directory / "step-1")
        export(run.directory, build(), options)  # the next run, with another number of ranks
        assert [path.name for path in run.directory.iterdir()] == ["step-1"]
        assert_whole(run.directory / "step-1")
        shutil.rmtree(run.directory)
