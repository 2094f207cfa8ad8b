"""A rank is killed at every point at which it touches the disk; the next run goes on as if nothing had happened."""

from __future__ import annotations

import random
import re
import resource
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardsmith.formats.dcp.beside_weights import open_step
from shardsmith.ground.layout import is_leftover, parse_step
from shardsmith.hooks import EMA, Hooks, ShardedSave, at, every, latest
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.manifest.metadata import read_metadata
from shardsmith.tensors.digest import digest_tensor
from shardsmith.tensors.tensors import read_tensor
from tests.hooks.killed_runs import RANKS, KilledRun, Server

pytestmark = pytest.mark.long

Mode = Literal["async", "disabled"]
Weights = Literal["dcp", "huggingface", "rounded"]
Copies = Literal["at once", "overlap", "prewarm"]


@dataclass(frozen=True, kw_only=True)
class Run(KilledRun):
    """One run of all ranks, from the last checkpoint if there is one, that saves every step and keeps the last."""

    steps: int
    mode: Mode
    file_limit: int | None = None
    """The victim dies when it makes a file longer than this."""
    width: int = 8
    weights: Weights = "dcp"
    copies: Copies = "at once"
    """With "prewarm" the first step is not saved: it makes what the save of the second would make."""

    def train(self) -> None:
        train(self)


def train(run: Run) -> None:
    """Train with Shardsmith attached. All ranks."""
    torch.manual_seed(7)
    random.seed(7)
    model = nn.Sequential(nn.Linear(run.width, 5), nn.Dropout(0.5), nn.Linear(5, run.width))
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ema = EMA(model, decay=0.5)
    save = ShardedSave(
        run.directory,
        model=model,
        optimizer=optimizer,
        ema=ema,
        when=at(2, 3) if run.copies == "prewarm" else every(1),
        keep=latest(1),
        async_mode=run.mode,
        weights="dcp" if run.weights == "dcp" else "huggingface",
        weights_dtype="bfloat16" if run.weights == "rounded" else None,
        staging="overlap" if run.copies == "overlap" else "copy",
        prewarm=run.copies == "prewarm",
        timeout_secs=1 if run.spare_others else 30,
    )
    hooks = Hooks(ema, save)
    step = hooks.resume()
    if dist.get_rank() == 0:
        run.beside("resumed").write_text(str(step))
    if run.file_limit is not None and dist.get_rank() == run.victim:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.file_limit, resource.RLIM_INFINITY))
    while step < run.steps:
        model(torch.ones(3, run.width)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        hooks.step(step)
    hooks.close()


def digests(checkpoint: Path) -> dict[str, str]:
    return {key: record.digest for key, record in read_metadata(checkpoint).tensors.items()}


def visible_steps(directory: Path) -> list[int]:
    """The steps that can be seen, each of which must be whole; nothing else may be seen, but what is kept."""
    found = {path.name for path in directory.iterdir()} if directory.exists() else set()
    names = [name for name in found - {".retention.json"} if not is_leftover(name)]
    for name in names:
        assert find_damage(directory / name) == []
        source = open_step(directory / name)
        assert {key: str(digest_tensor(read_tensor(source, key))) for key in source.specs} == digests(directory / name)
        source.close()
    return sorted(int(str(parse_step(name))) for name in names)


def committed_in(events: list[str]) -> list[int]:
    """The steps that rank 0 had renamed to their names before it was killed, by its own account."""
    goals = [line.split()[-1] for line in events[:-1] if line.startswith("os.rename ")]
    return [step for goal in goals if (step := parse_step(goal.strip("/"))) is not None]


def goes_on_and_ends_like(server: Server, killed: Run, straight: Path) -> None:
    """A new run takes up the newest checkpoint that can be seen and ends as the uninterrupted one did."""
    seen = visible_steps(killed.directory)
    last = int(straight.name.removeprefix("step-"))
    again = replace(killed, steps=last, victim=None, point=None, file_limit=None, spare_others=False)
    assert server.run(again) == [0, 0], again.beside("rank-0.log").read_text()
    assert int(again.beside("resumed").read_text()) == max(seen, default=0)
    assert {path.name for path in killed.directory.iterdir()} == {straight.name, ".retention.json"}
    assert visible_steps(killed.directory) == [last]
    assert digests(killed.directory / straight.name) == digests(straight)


def uninterrupted(server: Server, directory: Path, width: int = 8) -> Path:
    """The last checkpoint of a run that nobody disturbs."""
    run = Run(directory=directory / "straight", steps=3, mode="disabled", width=width)
    assert server.run(run) == [0, 0], run.beside("rank-0.log").read_text()
    return run.directory / "step-3"


@pytest.fixture(scope="module")
def straight(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(server, tmp_path_factory.mktemp("uninterrupted"))


def points(server: Server, tmp_path: Path, mode: Mode, victim: int, **options: Any) -> list[str]:
    """Everything that the victim does to the disk in a run that saves two steps and removes the first."""
    run = Run(directory=tmp_path / "count", steps=2, mode=mode, victim=victim, **options)
    assert server.run(run) == [0, 0], run.beside("rank-0.log").read_text()
    return run.events()


def test_the_points_are_those_of_probe_write_commit_and_retention(server: Server, tmp_path: Path) -> None:
    events = "\n".join(points(server, tmp_path, "disabled", 0))
    order = [
        r"mkdir /\.probe",
        r"mkdir /\.step-1\.tmp",
        r"fsync \S+/__0_0\.distcp",
        r"fsync \S+/\.metadata ",
        r"fsync \S+json",
    ]
    order += [r"rename /\.step-1\.tmp-\w+ /step-1\n", r"rename \S+ /step-2\n", r"rename /step-1 /\.step-1\.trash"]
    order += [r"remove \S+trash\S+/__0_0\.distcp", r"rmdir /\.step-1\.trash"]
    assert re.search("(?s:.*)".join(order), events)


# the digests of a step do not depend on the files that its weights are in, so all end like the same straight run
@pytest.mark.parametrize(
    ("mode", "weights"), [("disabled", "dcp"), ("async", "dcp"), ("async", "huggingface"), ("async", "rounded")]
)
@pytest.mark.parametrize("victim", range(RANKS))
def test_a_kill_at_any_point_leaves_whole_checkpoints_and_a_run_that_goes_on(
    server: Server, straight: Path, tmp_path: Path, mode: Mode, weights: Weights, victim: int
) -> None:
    events = points(server, tmp_path, mode, victim, weights=weights)
    # the background thread runs the same code: there, from the second save on
    first = 0 if mode == "disabled" else next(i for i, line in enumerate(events) if "/.step-2.tmp" in line)
    few = {"dcp": 1, "huggingface": 3, "rounded": 9}[weights]  # there are three times as many, and more
    for point in range(first, len(events), few):
        run = Run(directory=tmp_path / f"run-{point}", steps=2, mode=mode, victim=victim, point=point, weights=weights)
        assert server.run(run)[victim] == -signal.SIGKILL
        if victim == 0:
            assert max(visible_steps(run.directory), default=0) == max(committed_in(run.events()), default=0)
        goes_on_and_ends_like(server, run, straight)
        shutil.rmtree(run.directory)


# of rank 0, which commits, every fifth point; or the two would take as long as all of the above
@pytest.mark.parametrize("copies", ["overlap", "prewarm"])
@pytest.mark.parametrize("victim", range(RANKS))
def test_so_it_is_however_the_copies_are_made(
    server: Server, straight: Path, tmp_path: Path, copies: Copies, victim: int
) -> None:
    events = points(server, tmp_path, "async", victim, copies=copies)
    first = next(i for i, line in enumerate(events) if "/.step-2.tmp" in line)
    for point in range(first, len(events), 5 if victim == 0 else 1):
        run = Run(directory=tmp_path / f"run-{point}", steps=2, mode="async", victim=victim, point=point, copies=copies)
        assert server.run(run)[victim] == -signal.SIGKILL
        if victim == 0:
            assert max(visible_steps(run.directory), default=0) == max(committed_in(run.events()), default=0)
        goes_on_and_ends_like(server, run, straight)
        shutil.rmtree(run.directory)


def test_a_kill_while_the_leftovers_of_a_kill_are_swept_is_no_worse(
    server: Server, straight: Path, tmp_path: Path
) -> None:
    events = points(server, tmp_path, "disabled", 0)
    (in_retention,) = (i for i, line in enumerate(events) if "trash" in line and line.endswith("/__1_0.distcp "))
    first = next(i for i, line in enumerate(events) if "/.step-1.tmp" in line)  # what is before is done at each start
    for point in range(first, first + 8):
        run = Run(directory=tmp_path / f"run-{point}", steps=2, mode="disabled", victim=0, point=in_retention)
        assert server.run(run)[0] == -signal.SIGKILL
        assert server.run(replace(run, steps=3, point=point))[0] == -signal.SIGKILL
        goes_on_and_ends_like(server, run, straight)


@pytest.mark.parametrize("victim", range(RANKS))
@pytest.mark.parametrize("limit", [40_000, 90_000, 150_000])
def test_a_kill_in_the_middle_of_a_write_is_no_worse(server: Server, tmp_path: Path, victim: int, limit: int) -> None:
    straight = uninterrupted(server, tmp_path, width=3000)
    run = Run(directory=tmp_path / "run", steps=2, mode="async", victim=victim, file_limit=limit, width=3000)
    assert server.run(run)[victim] == -signal.SIGXFSZ
    (torn,) = run.directory.glob(f".step-1.tmp-*/__{victim}_0.distcp")
    assert torn.stat().st_size == limit
    goes_on_and_ends_like(server, run, straight)


# in the first save: before its shard is opened, and before it is fsynced
@pytest.mark.parametrize("what", ["open", "fsync"])
@pytest.mark.parametrize("victim", range(RANKS))
def test_a_rank_that_is_left_behind_ends_with_an_error_that_names_the_dead_one(
    server: Server, straight: Path, tmp_path: Path, victim: int, what: str
) -> None:
    mode: Mode = "disabled"  # in the background too, unless the training itself notices first
    events = points(server, tmp_path, mode, victim)
    point = next(i for i, line in enumerate(events) if re.match(rf"{what} \S+distcp", line))
    run = Run(directory=tmp_path / "run", steps=2, mode=mode, victim=victim, point=point, spare_others=True)
    ends = server.run(run)
    assert ends[victim] == -signal.SIGKILL
    assert ends[1 - victim] == 1
    assert re.search(rf"Rank\w+Error: writing step-1.*rank {victim}", run.beside(f"rank-{1 - victim}.log").read_text())
    assert visible_steps(run.directory) == []
    if victim != 0:
        assert {path.name for path in run.directory.iterdir()} <= {".retention.json"}
    goes_on_and_ends_like(server, run, straight)
