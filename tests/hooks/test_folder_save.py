"""FolderSave: our directory in a folder that somebody else wrote, whatever happens meanwhile."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardsmith.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MismatchError,
    RankFailedError,
    UsageError,
)
from shardsmith.formats.by_path import open_source
from shardsmith.ground.layout import is_leftover
from shardsmith.hooks import EMA, FolderSave, Hooks
from shardsmith.manifest.companion import (
    companion_of,
    find_folder_damage,
    is_complete,
    is_deserted,
    read_folder_record,
)
from shardsmith.tensors.digest import digest_tensor
from shardsmith.tensors.tensors import read_tensor
from tests.hooks.training import Tiny
from tests.ranks import run_on_ranks

STEP = 5


def make(directory: Path, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, EMA, FolderSave, Path]:
    """A model with an average that has moved, and the folder that a trainer has just written of it."""
    torch.manual_seed(2)
    model = model or Tiny()
    if dist.is_initialized():
        fully_shard(model)
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update()
    folder = directory / f"checkpoint-{STEP}"
    write_as_a_trainer(folder)
    return model, ema, FolderSave(model, ema=ema, **options), folder


def write_as_a_trainer(folder: Path) -> None:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for name in ("model.bin", "optimizer.bin", "logs/events"):
        (folder / name).write_bytes(name.encode() * 1000)


def theirs(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] in ("model.bin", "optimizer.bin", "logs")
    }


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_it_appears_as_a_whole_and_the_folder_keeps_its_time(tmp_path: Path, mode: str) -> None:
    told: list[tuple[int, Path]] = []
    model, ema, save, folder = make(tmp_path, async_mode=mode)
    before, time = theirs(folder), folder.stat().st_mtime_ns
    hooks = Hooks(ema, save)
    save.announce_saved = lambda step, path: told.append((step, path))
    save.save(STEP, folder)
    hooks.close()
    assert told == [(STEP, folder)]
    assert (theirs(folder), folder.stat().st_mtime_ns) == (before, time)
    assert find_folder_damage(folder) == []
    record = read_folder_record(folder)
    assert (record.step, sorted(record.files)) == (STEP, ["logs/events", "model.bin", "optimizer.bin"])
    weights = {name: value for name, value in model.state_dict().items() if name != "head.weight"}  # tied
    assert {name: found.digest for name, found in record.tensors.items()} == {
        name: str(digest_tensor(value)) for name, value in weights.items()
    }


def test_what_two_ranks_wrote_is_proved_and_loaded_by_one(tmp_path: Path) -> None:
    run_on_ranks(run_save, 2, tmp_path, tmp_path)
    _, ema, save, folder = make(tmp_path / "again")
    expected = {name: value.clone() for name, value in ema.model_state_dict().items()}
    ema.reset()
    assert save.load(tmp_path / folder.name) == STEP
    assert save.resume() == STEP
    assert ema.updates == 1
    for name, value in ema.model_state_dict().items():
        assert torch.equal(value, expected[name])


def open_files(folder: Path) -> list[str]:
    """Those of a folder that this process has open or mapped."""
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    found = [os.readlink(link) for link in links if link.is_symlink()]
    return [line for line in [*found, *Path("/proc/self/maps").read_text().splitlines()] if str(folder) in line]


def test_an_average_that_cannot_be_opened_leaves_no_file_of_the_trainer_open(tmp_path: Path) -> None:
    model, ema, save, folder = make(tmp_path, async_mode="disabled")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    save.save(STEP, folder)
    save.close()
    source = open_source(folder, "ema")
    for name, value in ema.model_state_dict().items():
        assert name in source.aliases or torch.equal(read_tensor(source, name), value)
    assert open_files(folder)
    source.close()
    del source
    assert not open_files(folder)
    index = companion_of(folder) / ".metadata"
    index.write_bytes(bytes(index.stat().st_size))
    with pytest.raises(CorruptCheckpointError, match="metadata") as caught:
        open_source(folder, "ema")
    assert not open_files(folder)
    assert caught.tb is not None, "the frames are still there, and what they hold"


def run_save(directory: Path) -> None:
    _, _, save, folder = make(directory)
    dist.barrier()
    save.save(STEP, folder)
    save.close()


@pytest.mark.parametrize("fault", ["weights", "average", "decay", "nothing", "no average"])
def test_a_load_that_is_not_what_was_saved_is_refused(tmp_path: Path, fault: str) -> None:
    model, ema, save, folder = make(tmp_path)
    if fault != "nothing":
        (FolderSave(model) if fault == "no average" else save).save(STEP, folder)
    save.wait()
    errors: dict[str, type[Exception]] = {"weights": MismatchError, "average": CorruptCheckpointError}
    errors |= {"decay": UsageError, "nothing": CheckpointNotFoundError, "no average": CheckpointNotFoundError}
    if fault == "weights":
        with torch.no_grad():
            model.norm.weight[3] += 1e-6
    if fault == "average":
        (shard,) = companion_of(folder).glob("*.distcp")
        shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    if fault == "decay":
        ema.decay = 0.25
    with pytest.raises(errors[fault]) as error:
        save.load(folder)
    if fault == "weights":
        assert error.value.problems == ["norm.weight: has other values"]


def test_a_folder_without_an_average_lets_one_start_where_that_is_asked_for(tmp_path: Path) -> None:
    model, ema, save, folder = make(tmp_path)
    FolderSave(model, async_mode="disabled").save(STEP, folder)
    before = {name: value.clone() for name, value in ema.model_state_dict().items()}
    with pytest.raises(CheckpointNotFoundError, match=r'holds no average.*on_missing="start"'):
        save.load(folder)
    assert save.load(folder, on_missing="start") == STEP
    assert all(torch.equal(value, before[name]) for name, value in ema.model_state_dict().items())
    hooks = Hooks(ema, save)
    assert hooks.resume() == STEP
    with torch.no_grad():
        model.norm.weight[3] += 1e-6
    with pytest.raises(MismatchError, match="1 of"):
        save.load(folder, on_missing="start")  # the weights are compared all the same
    hooks.close(broken_off=True)


def test_a_folder_that_is_written_again_has_no_mark_meanwhile(tmp_path: Path) -> None:
    _, _, save, folder = make(tmp_path)
    save.save(STEP, folder)
    save.before_save(folder)
    assert not is_complete(folder)
    (folder / "model.bin").write_bytes(b"other weights")
    save.save(STEP, folder)
    save.close()
    assert find_folder_damage(folder) == []


def test_a_folder_that_the_trainer_deletes_meanwhile_costs_nothing_else(tmp_path: Path) -> None:
    _, _, save, folder = make(tmp_path)
    save.save(STEP, folder)
    shutil.rmtree(folder, ignore_errors=True)  # as Trainer; accelerate looks at no error either
    save.wait()
    assert is_deserted(folder)
    write_as_a_trainer(folder)
    save.save(STEP + 1, folder)
    save.close()
    assert find_folder_damage(folder) == []


def test_what_the_trainer_could_not_delete_because_of_us_is_deleted(tmp_path: Path) -> None:
    _, _, save, folder = make(tmp_path)
    save.save(STEP, folder)
    for name in theirs(folder):
        (folder / name).unlink()
    (folder / "logs").rmdir()
    save.wait()
    assert not folder.exists() or is_complete(folder)  # complete: it was faster
    save.close()


def test_a_rank_that_cannot_write_is_an_error_on_all_and_the_folder_is_the_trainers_alone(tmp_path: Path) -> None:
    run_on_ranks(run_out_of_space, 2, tmp_path, tmp_path)


def run_out_of_space(directory: Path) -> None:
    _, _, save, folder = make(directory, nn.Linear(1024, 1024))
    dist.barrier()
    before = theirs(folder)
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    save.save(STEP, folder)
    with pytest.raises(RankFailedError, match="rank 1"):
        save.wait()
    assert theirs(folder) == before
    assert not is_complete(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    save.save(STEP, folder)
    save.close()
    assert find_folder_damage(folder) == []


@pytest.mark.parametrize("point", range(0, 60, 8))
def test_killed_at_any_point_the_folder_is_whole_or_not_marked_and_the_next_save_works(
    tmp_path: Path, point: int
) -> None:
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        run_on_ranks(run_killed, 1, tmp_path, tmp_path, point)
    folder = tmp_path / f"checkpoint-{STEP}"
    assert [len(content) for _, content in sorted(theirs(folder).items())] == [11000, 9000, 13000]
    assert not is_complete(folder) or find_folder_damage(folder) == []
    run_on_ranks(run_save, 1, tmp_path, tmp_path)
    assert find_folder_damage(folder) == []
    assert not [path for path in folder.iterdir() if is_leftover(path.name)]


def run_killed(directory: Path, point: int) -> None:
    """Save, and die before touching the disk for the time number ``point``, or in the end."""
    _, _, save, folder = make(directory, async_mode="disabled")
    left = [point]

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.utime") and str(folder) in str(given[0]):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    save.save(STEP, folder)
    os.kill(os.getpid(), signal.SIGKILL)
