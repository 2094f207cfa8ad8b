"""With ``prewarm`` the first step makes what the first save would: memory, and who writes what. Steps are the same."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardsmith.errors import NotEnoughMemoryError, RankFailedError, UsageError
from shardsmith.ground import host_memory
from shardsmith.ground.ranks import Ranks
from shardsmith.hooks import EMA, FolderSave, Hooks, ShardedSave, every
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from shardsmith.manifest.companion import companion_of
from shardsmith.manifest.metadata import read_metadata
from tests.hooks.training import build
from tests.ranks import run_on_ranks

OPTIONS: dict[str, dict[str, Any]] = {
    "copy": {},
    "overlap": {"staging": "overlap"},
    "windows": {"max_host_memory": "1kB"},
    "one write": {"weights": "huggingface"},
}


def train(directory: Path, sharding: str, steps: int, **options: Any) -> list[tuple[int, int, list[int]]]:
    """Return what was there after each step: agreements that it waited for, and where the memory is."""
    model = build(sharding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = EMA(model, decay=0.9)
    save = ShardedSave(directory, model=model, optimizer=optimizer, ema=ema, when=every(3), **options)
    seen, dealt = [], 0
    deal = Ranks.deal

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal dealt
        # Who of a host makes files durable is agreed in the background.
        dealt += args[0] is save._ranks and threading.current_thread() is threading.main_thread()
        return deal(*args, **kwargs)

    Ranks.deal = counted  # type: ignore[method-assign]
    hooks = Hooks(ema, save)
    done = hooks.resume()
    dealt = 0  # the digests of what was loaded are dealt out, too
    for step in range(done + 1, steps + 1):
        model(torch.randint(11, (3, 4))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        hooks.step(step)
        buffer = save._buffer
        places = [one._memory.data_ptr() for one in (buffer, buffer.beside)] if buffer is not None else []
        seen.append((step, dealt, places))
    hooks.close()
    Ranks.deal = deal  # type: ignore[method-assign]
    return seen


def run_both(directory: Path, sharding: str, options: dict[str, Any]) -> None:
    seen = train(directory / "warm", sharding, 1, prewarm=True, **options)
    if dist.is_initialized():
        dist.barrier()
    assert not [path for path in (directory / "warm").iterdir() if path.name.startswith("step")]
    seen = train(directory / "warm", sharding, 7, prewarm=True, **options)
    assert [dealt for _, dealt, _ in seen] == [1] * 7, "at the first step, and never again"
    assert len({tuple(places) for *_, places in seen}) == 1
    train(directory / "cold", sharding, 7, **options)


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1", "ddp"])
@pytest.mark.parametrize("name", OPTIONS)
def test_saves_find_memory_and_agreement_and_hold_the_same(name: str, sharding: str, tmp_path: Path) -> None:
    run_on_ranks(run_both, 2, tmp_path, tmp_path, sharding, OPTIONS[name])
    for step in (3, 6):
        warm, cold = (tmp_path / kind / f"step-{step}" for kind in ("warm", "cold"))
        assert {key: record.digest for key, record in read_metadata(warm).tensors.items()} == {
            key: record.digest for key, record in read_metadata(cold).tensors.items()
        }
        assert find_damage(warm) == []


def test_one_process_without_a_group_too(tmp_path: Path) -> None:
    run_both(tmp_path, "none", {})
    assert committed_steps(tmp_path / "warm") == [3, 6]


def test_a_run_that_resumes_makes_it_after_its_first_step(tmp_path: Path) -> None:
    train(tmp_path, "none", 4, prewarm=True)
    assert [dealt for _, dealt, _ in train(tmp_path, "none", 7, prewarm=True)] == [1, 1, 1, 1]


def with_little_memory(left: int) -> host_memory.Limit:
    return host_memory.Limit("machine", "the machine", 1 << 40, left)


def run_without_room(directory: Path) -> None:
    logging.disable()
    model = build("fsdp2")
    save = ShardedSave(directory, model=model, when=every(3), prewarm=True)
    limits = host_memory.memory_limits
    host_memory.memory_limits = lambda: [with_little_memory(1 << 20)]
    hooks = Hooks(save)
    with pytest.raises(RankFailedError, match="making memory for saves: too little memory"):
        hooks.step(1)
    host_memory.memory_limits = limits
    assert [*directory.glob("*step*")] == []
    for step in (2, 3):
        hooks.step(step)
    hooks.close()
    dist.barrier()
    assert committed_steps(directory) == [3]


def test_too_little_memory_is_an_error_at_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_ranks(run_without_room, 2, tmp_path, tmp_path / "run")
    monkeypatch.setattr(host_memory, "memory_limits", lambda: [with_little_memory(1 << 20)])
    hooks = Hooks(ShardedSave(tmp_path / "one", model=nn.Linear(4, 4), when=every(3), prewarm=True))
    with pytest.raises(NotEnoughMemoryError):
        hooks.step(1)


def test_without_copies_there_is_nothing_to_make(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ShardedSave: prewarm"):
        ShardedSave(tmp_path, model=nn.Linear(4, 4), when=every(3), prewarm=True, async_mode="disabled")
    with pytest.raises(UsageError, match="FolderSave: prewarm"):
        FolderSave(nn.Linear(4, 4), prewarm=True, async_mode="disabled")


def run_folders(directory: Path, sharding: str, prewarm: bool) -> None:
    """Steps of a trainer that writes folders itself, the second of which has a save."""
    model = build(sharding)
    ema = EMA(model, decay=0.9)
    save = FolderSave(model, ema=ema, prewarm=prewarm)
    hooks = Hooks(ema, save)
    hooks.resume()
    assert save._buffer is not None
    memory = []
    for step in (1, 2, 3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        hooks.step(step)
        if step > 1:
            folder = directory / f"checkpoint-{step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.bin").write_bytes(b"theirs")
            if dist.is_initialized():
                dist.barrier()
            save.save(step, folder)
            save.wait()
        memory.append((save._buffer._memory.data_ptr(), len(save._buffer._memory)))
    assert (memory[0][1] > 0) == prewarm
    assert len({*memory[0 if prewarm else 1 :]}) == 1, "made once"
    hooks.close()


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1", "ddp"])
def test_folders_of_a_trainer_hold_the_same_average(sharding: str, tmp_path: Path) -> None:
    for kind in ("warm", "cold"):
        run_on_ranks(run_folders, 2, tmp_path, tmp_path / kind, sharding, kind == "warm")
    for step in (2, 3):
        warm, cold = (companion_of(tmp_path / kind / f"checkpoint-{step}") for kind in ("warm", "cold"))
        assert read_metadata(warm).tensors.keys() >= {"ema_model.norm.weight"}
        assert {key: record.digest for key, record in read_metadata(warm).tensors.items()} == {
            key: record.digest for key, record in read_metadata(cold).tensors.items()
        }
