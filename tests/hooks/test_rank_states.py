"""What each rank has for itself, and what all must have alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from shardsmith.errors import RankError, RanksDisagreeError
from shardsmith.ground.layout import PROVENANCE_FILE
from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, every, per_rank
from shardsmith.manifest.checkpoints import committed_steps
from tests.ranks import run_on_ranks

SAMPLES = 96
BATCH = 6
"""Samples of a step, over all ranks: those of two and of three ranks divide it."""


class Numbers(torch.utils.data.Dataset[int]):
    """Sample ``i`` is ``i``."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index


class Counter:
    """A state that a user writes: how far this rank is."""

    def __init__(self) -> None:
        self.count = 100 * (dist.get_rank() + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def make_loader(workers: int, batch: int | None = None) -> StatefulDataLoader[int]:
    rank, size = dist.get_rank(), dist.get_world_size()
    sampler = StatefulDistributedSampler(Numbers(), num_replicas=size, rank=rank, shuffle=True, seed=4)
    # As torchrun's ranks do. Those of a fork server would start new interpreters, 5 s of a processor each.
    how = "fork" if workers else None
    return StatefulDataLoader(
        Numbers(), batch_size=batch or BATCH // size, sampler=sampler, num_workers=workers, multiprocessing_context=how
    )


def run_training(directory: Path, log: Path, last: int, workers: int, options: dict[str, Any]) -> None:
    """Write down the samples of every step and rank."""
    model = nn.Linear(2, 2)
    fully_shard(model)
    loader = make_loader(workers, options.pop("batch", None))
    state = {"data": per_rank(loader, **options)}
    hooks = Hooks(ShardedSave(directory, model=model, when=every(last), stateful=state))
    step, batches = hooks.resume(), iter(loader)
    while step < last:
        step += 1
        samples = next(batches).tolist()
        (log / f"{step}-{dist.get_rank()}.json").write_text(json.dumps(samples))
        hooks.step(step)
    hooks.close()


def samples_of(log: Path, step: int) -> list[int]:
    return sorted(sample for path in log.glob(f"{step}-*.json") for sample in json.loads(path.read_text()))


def train(tmp_path: Path, name: str, ranks: Sequence[int], workers: int = 0, **options: Any) -> Path:
    """Three steps on each number of ranks in turn; the samples that they used."""
    log = tmp_path / f"{name}-log"
    log.mkdir()
    for i, size in enumerate(ranks):
        run_on_ranks(run_training, size, tmp_path, tmp_path / name, log, 3 * (i + 1), workers, options)
    return log


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("ranks", [(2, 2), (2, 3), (3, 2)])
def test_a_run_that_resumes_goes_on_with_the_next_samples(tmp_path: Path, ranks: tuple[int, int], workers: int) -> None:
    straight = tmp_path / "straight-log"
    straight.mkdir()
    run_on_ranks(run_training, ranks[0], tmp_path, tmp_path / "straight", straight, 6, 0, {})
    resumed = train(tmp_path, "resumed", ranks, workers)
    for step in range(1, 7):
        assert len(samples_of(straight, step)) == BATCH
        assert samples_of(resumed, step) == samples_of(straight, step)
    if ranks[0] == ranks[1]:
        assert all((resumed / path.name).read_text() == path.read_text() for path in straight.iterdir())


def test_what_does_not_divide_among_the_ranks_stops_the_resume_with_names(tmp_path: Path) -> None:
    log = train(tmp_path, "run", [2])
    with pytest.raises(Exception, match="data: saved by 2 ranks") as caught:
        run_on_ranks(run_training, 3, tmp_path, tmp_path / "run", log, 6, 0, {"batch": 5})
    assert "18 samples were used, which 3 ranks with batches of 5 cannot share evenly" in str(caught.value)
    assert 'on_topology_change="restart"' in str(caught.value)


def run_restart(directory: Path, log: Path) -> None:
    run_training(directory, log, 4, 0, {"batch": 5, "on_topology_change": "restart"})


def test_a_loader_can_begin_anew_if_that_is_asked_for(tmp_path: Path) -> None:
    log = train(tmp_path, "run", [2])
    run_on_ranks(run_restart, 3, tmp_path, tmp_path / "run", log)
    assert samples_of(log, 1) == [sample for sample in samples_of(log, 4) if sample in samples_of(log, 1)]


def share_out(states: Sequence[Any], rank: int, size: int) -> dict[str, Any]:
    return {"count": sum(state["count"] for state in states) + rank + size}


def run_counters(directory: Path, is_new: bool, expected: int | None, reshards: bool) -> None:
    model, counter = nn.Linear(2, 2), Counter()
    fully_shard(model)
    own = counter.count
    reshard = share_out if reshards else None
    save = ShardedSave(directory, model=model, when=every(1), stateful={"data": per_rank(counter, reshard=reshard)})
    hooks = Hooks(save)
    if is_new:
        hooks.step(1)
        hooks.close()
        return
    counter.count = -1
    if expected is None:
        with pytest.raises(RankError, match=r"data: saved by 2 ranks, .* this run is 3 ranks"):
            hooks.resume()
        assert counter.count == -1
        hooks.close(broken_off=True)
        return
    assert hooks.resume() == 1
    assert counter.count == (own if expected == 0 else expected + dist.get_rank())
    hooks.close()


def test_state_of_single_ranks_goes_back_to_its_rank_or_through_the_users_function(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run_on_ranks(run_counters, 2, tmp_path, directory, True, None, False)
    run_on_ranks(run_counters, 2, tmp_path, directory, False, 0, False)
    run_on_ranks(run_counters, 3, tmp_path, directory, False, 303, True)
    run_on_ranks(run_counters, 3, tmp_path, directory, False, None, False)


def run_shared(directory: Path) -> None:
    model, counter = nn.Linear(2, 2), Counter()
    fully_shard(model)
    save = ShardedSave(directory, model=model, when=every(1), stateful={"data": counter})
    with pytest.raises(RanksDisagreeError, match=r"data\.count: rank 0 and rank 1 hold different values") as caught:
        save.save(1)
    assert 'stateful={"data": per_rank(loader)}' in str(caught.value)
    counter.count = 5
    save.save(2)
    save.close()


def test_state_that_differs_between_ranks_under_one_key_is_refused_before_it_is_saved(tmp_path: Path) -> None:
    run_on_ranks(run_shared, 2, tmp_path, tmp_path / "run")
    assert committed_steps(tmp_path / "run") == [2]


# Replicas


class Normed(nn.Module):
    """With statistics that DDP does not keep the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(self.first(inputs))


def run_replicas(directory: Path, wrapped: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = Normed()
    if wrapped:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    save = ShardedSave(directory, model=model, optimizer=optimizer, when=every(1))
    torch.manual_seed(dist.get_rank())
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    if wrapped:
        save.save(1)
    else:
        with pytest.raises(RanksDisagreeError, match=r"norm\.bias: rank 0 and rank 1 hold different values") as caught:
            save.save(1)
        assert "DDP was forgotten" in str(caught.value)
        assert "norm.running_mean" not in str(caught.value)
    save.close()


def run_exported_replicas(directory: Path, wrapped: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = Normed()
    if wrapped:
        model = DistributedDataParallel(model)
    ema = EMA(model, decay=0.5)
    export = HFExport(directory, model=model, ema=ema, when=every(1), compare_replicas=2)
    torch.manual_seed(dist.get_rank())
    model(torch.randn(8, 4)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    ema.update()
    if wrapped:
        export.export(1)
    else:
        with pytest.raises(RanksDisagreeError, match=r"norm\.bias: rank 0 and rank 1 hold different values") as caught:
            export.export(1)
        assert str(caught.value).startswith("collecting step-1: ")
        assert "ema.norm.bias: rank 0 and rank 1" in str(caught.value)
        assert "running_mean" not in str(caught.value)
        export.export(2)  # the second is not compared, the third is
        with pytest.raises(RanksDisagreeError, match=r"first\.weight: rank 0 and rank 1 hold different values"):
            export.export(3)
    export.close()


@pytest.mark.parametrize("wrapped", [True, False])
def test_replicas_that_have_gone_apart_are_named(tmp_path: Path, wrapped: bool) -> None:
    run_on_ranks(run_replicas, 2, tmp_path, tmp_path / "run", wrapped)
    assert committed_steps(tmp_path / "run") == ([1] if wrapped else [])


@pytest.mark.parametrize("wrapped", [True, False])
def test_replicas_that_have_gone_apart_are_named_before_an_export(tmp_path: Path, wrapped: bool) -> None:
    run_on_ranks(run_exported_replicas, 2, tmp_path, tmp_path / "hf", wrapped)
    assert committed_steps(tmp_path / "hf", PROVENANCE_FILE) == ([1] if wrapped else [2])
