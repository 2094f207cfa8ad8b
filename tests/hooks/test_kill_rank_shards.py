"""A rank is killed in the middle of a save in files of single ranks: nothing torn is seen, and the run goes on."""

from __future__ import annotations

import random
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardsmith import ShardedCheckpointManager
from shardsmith.formats.rank_shards import RankShards
from shardsmith.ground.layout import is_leftover
from shardsmith.hooks import EMA, ShardedSave, every
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.manifest.metadata import read_metadata
from shardsmith.tensors.digest import digest_tensor
from shardsmith.tensors.tensors import read_tensor
from tests.hooks.killed_runs import RANKS, KilledRun, Server


@dataclass(frozen=True, kw_only=True)
class Run(KilledRun):
    """One run of all ranks, from the newest checkpoint if there is one, that saves every step."""

    steps: int
    resumed_by: Literal["manager", "hook"] = "manager"

    def train(self) -> None:
        torch.manual_seed(7)
        random.seed(7)
        model = nn.Sequential(nn.Linear(8, 5), nn.Dropout(0.5), nn.Linear(5, 8))
        fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ema = EMA(model, decay=0.5)
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "ema": ema}
        manager = ShardedCheckpointManager(self.directory, **parts, backend="per_rank", timeout_secs=30)
        if self.resumed_by == "hook":
            step = ShardedSave(self.directory, **parts, when=every(1)).resume() or 0
        else:
            step = (manager.newest_checkpoint() and manager.load_sharded_checkpoint().step) or 0
        if dist.get_rank() == 0:
            self.beside("resumed").write_text(str(step))
        while step < self.steps:
            model(torch.ones(3, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            step += 1
            manager.save_sharded_checkpoint(step)


def visible(directory: Path) -> dict[str, dict[str, str]]:
    """Digests by tensor of every step that can be seen, each of which must be whole; nothing else may be seen."""
    found = {}
    for path in sorted(path for path in directory.iterdir() if not is_leftover(path.name)):
        assert find_damage(path) == []
        source = RankShards(path)
        found[path.name] = {key: str(digest_tensor(read_tensor(source, key))) for key in source.specs}
        source.close()
        assert found[path.name] == {key: record.digest for key, record in read_metadata(path).tensors.items()}
    return found


@pytest.fixture(scope="module")
def straight(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What three steps without a break lead to."""
    run = Run(directory=tmp_path_factory.mktemp("straight") / "run", steps=3)
    assert server.run(run) == [0] * RANKS
    return visible(run.directory)


KILLS = [  # before this, in the save of step 2
    (0, "os.mkdir"),
    (0, "open weights"),
    (0, "fsync state"),
    (0, "open metadata.json"),
    (0, "fsync metadata.json"),
    (0, "os.rename"),
    (0, "after the rename"),
    (1, "open weights"),
    (1, "fsync weights"),
    (1, "fsync state"),
]


@pytest.fixture(scope="module")
def events(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """Rank -> what it does to the disk in two steps, as words: what, and to which file."""
    found = {}
    for victim in range(RANKS):
        run = Run(directory=tmp_path_factory.mktemp("count") / "run", steps=2, victim=victim)
        assert server.run(run) == [0] * RANKS
        found[victim] = run.events()
    return found


def point_of(what: str, events: list[str]) -> int:
    """The number of an event in the save of step 2."""
    begin = next(i for i, line in enumerate(events) if "/.step-2.tmp-" in line)
    if what == "after the rename":
        return len(events) - 1
    word, _, file = what.partition(" ")
    pattern = re.compile(rf"{re.escape(word)} /\.step-2\.tmp-\w+{f'/{file}' if file else ''}")
    return next(i for i, line in enumerate(events) if i >= begin and pattern.match(line))


@pytest.mark.parametrize(("victim", "what"), KILLS)
def test_a_kill_in_a_save_leaves_whole_steps_alone_and_the_next_run_goes_on(
    victim: int,
    what: str,
    events: dict[int, list[str]],
    server: Server,
    straight: dict[str, dict[str, str]],
    tmp_path: Path,
) -> None:
    run = Run(directory=tmp_path / "run", steps=2, victim=victim, point=point_of(what, events[victim]))
    assert server.run(run)[victim] == -signal.SIGKILL
    last = 2 if what == "after the rename" else 1
    assert visible(run.directory) == {f"step-{step}": straight[f"step-{step}"] for step in range(1, last + 1)}
    assert any(is_leftover(path.name) for path in run.directory.iterdir()) == (
        what not in ("os.mkdir", "after the rename")
    )
    again = Run(directory=run.directory, steps=3, resumed_by="hook" if victim else "manager")
    assert server.run(again) == [0] * RANKS, again.beside("rank-0.log").read_text()
    assert int(again.beside("resumed").read_text()) == last
    assert visible(run.directory) == straight
    assert not any(is_leftover(path.name) for path in run.directory.iterdir())
