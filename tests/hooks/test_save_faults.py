"""What goes wrong on one rank goes wrong on all, quickly and by name, and costs only the save it happened in."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardsmith.errors import (
    IncompleteCheckpointError,
    MismatchError,
    ShardsmithError,
    TargetExistsError,
    UsageError,
)
from shardsmith.formats.dcp.index import read_index
from shardsmith.ground.layout import METADATA_FILE, is_leftover
from shardsmith.ground.ranks import Ranks
from shardsmith.hooks import EMA, ShardedSave, at, every, latest
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from shardsmith.manifest.metadata import read_metadata
from shardsmith.run_state.contents import Contents
from shardsmith.run_state.save import SaveInProgress
from shardsmith.sharding.live_boxes import StagingBuffer
from tests.ranks import error_of_all, run_on_ranks

Mode = Literal["async", "disabled"]
LIMIT = 1 << 20  # bytes: more than any file but a shard


class FullBuffer(StagingBuffer):
    """Memory into which nothing can be copied."""

    def places(self, *_: Any) -> NoReturn:
        raise RuntimeError("cannot be copied")

    stage = copy = places


class Stateful:
    """Has a state unless told to raise instead, or to be the last thing written."""

    fault = ""

    def state_dict(self) -> dict[str, Any]:
        if self.fault == "collecting":
            raise ZeroDivisionError("no state today")
        if self.fault == "writing":  # the save before this one has ended
            limit_files(LIMIT)
        return {"thing": "thing"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["thing"] == "thing"


def sharded_model() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Linear(1024, 1024)
    fully_shard(model)
    return model


def test_an_error_on_one_rank_is_raised_on_all_and_costs_only_that_save(tmp_path: Path) -> None:
    run_on_ranks(run_failing_ranks, 2, tmp_path, tmp_path / "run", "async", ("collecting", "staging", "writing"))


def test_so_it_is_without_a_background_thread(tmp_path: Path) -> None:
    run_on_ranks(run_failing_ranks, 2, tmp_path, tmp_path / "run", "disabled", ("collecting", "writing"))


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({"staging": "overlap"}, ("collecting", "staging", "writing")),
        ({"staging": "overlap", "prewarm": True}, ("collecting", "staging", "writing")),
        ({"max_host_memory": "512KB"}, ("writing",)),
        ({"max_host_memory": "512KB", "prewarm": True}, ("writing",)),
    ],
)
def test_so_it_is_while_the_state_is_still_being_copied(
    tmp_path: Path, options: dict[str, Any], phases: tuple[str, ...]
) -> None:
    run_on_ranks(run_failing_ranks, 2, tmp_path, tmp_path / "run", "async", phases, options)


EXPECTED = {
    "collecting": "ZeroDivisionError: no state today",
    "staging": "RuntimeError: cannot be copied",
    "writing": "File too large (",
}


def run_failing_ranks(
    directory: Path, mode: Mode, phases: tuple[str, ...], options: dict[str, Any] | None = None
) -> None:
    logging.disable()  # the errors in the background thread are meant to happen
    thing, model = Stateful(), sharded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if options else None
    save = ShardedSave(
        directory,
        model=model,
        optimizer=optimizer,
        stateful={"extra": thing},
        when=at(10**9),
        keep=latest(1),
        async_mode=mode,
        **(options or {}),
    )
    save.on_step_end(0)  # here it makes its memory, where it is to
    step = 1
    save.save(step)
    for phase in phases:
        for culprit in range(2):
            buffer = save._buffer
            if dist.get_rank() == culprit:
                thing.fault = phase
                if phase == "staging":
                    save._buffer = FullBuffer()
                    save._buffer.has_room = True  # as on the other rank: both looked at the first save
            step += 1
            # the second call reports what went wrong in the background of the first
            text = error_of_all(lambda step=step: [save.save(step), save.save(step + 1)])
            thing.fault, save._buffer = "", buffer
            limit_files(resource.RLIM_INFINITY)
            assert f"{phase} step-{step} failed on " in text
            assert f"rank {culprit}: " in text
            assert EXPECTED[phase] in text
            assert committed_steps(directory) == [step - 1]  # nothing new, and the old one was not retired
            assert_group_works()
            save.save(step)  # the very step that failed
    save.close()
    dist.barrier()
    assert {path.name for path in directory.iterdir()} == {f"step-{step}", ".retention.json"}
    assert find_damage(directory / f"step-{step}") == []


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def assert_group_works() -> None:
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == dist.get_world_size()


def test_ranks_that_disagree_or_meet_an_existing_target_write_nothing(tmp_path: Path) -> None:
    run_on_ranks(run_refusals, 2, tmp_path, tmp_path)


def run_refusals(directory: Path) -> None:
    run = directory / "run"
    ranks = Ranks()

    def begin(contents: Contents) -> SaveInProgress:
        job = SaveInProgress(run / "step-1", ranks)
        job.begin(lambda: contents)
        return job

    rank = dist.get_rank()
    check_disagreement_names_what_differs(begin, rank)
    dist.barrier()
    assert not run.exists()
    dist.barrier()
    check_an_existing_target_is_left_as_it_is(begin, run)
    check_ranks_may_hold_different_tensors(begin, rank)


def check_disagreement_names_what_differs(begin: Callable[[Contents], SaveInProgress], rank: int) -> None:
    same = {"a": torch.ones(3), "sub": {"c": torch.ones(1)}}
    shape = {**same, "b": torch.ones(2 + rank)}
    dtype = {**same, "sub": {"b": torch.ones(2, dtype=[torch.int64, torch.bfloat16][rank])}}
    for contents, expected in [
        (Contents(step=1, state_dict=shape), "\n  b: rank 0 ([2], 'float32'), rank 1 ([3], 'float32')"),
        (Contents(step=1, state_dict=dtype), "\n  sub.b: rank 0 ([2], 'int64'), rank 1 ([2], 'bfloat16')"),
        (Contents(step=1 + rank, state_dict=same), "\n  step: rank 0 1, rank 1 2"),
        (Contents(step=1, state_dict=same, ema={"decay": 0.5} if rank else None), "\n  ema: rank 0 None, rank 1 {"),
        (Contents(step=1, state_dict=same, mesh={"shape": [2 - rank]}), "\n  mesh: rank 0 {'shape': [2]}, rank 1 {"),
    ]:
        text = error_of_all(lambda contents=contents: begin(contents))
        assert "RanksDisagreeError" in text
        assert "nothing was written" in text
        assert expected in text
        assert "\n  a: " not in text
        assert_group_works()


def check_an_existing_target_is_left_as_it_is(begin: Callable[[Contents], SaveInProgress], run: Path) -> None:
    if dist.get_rank() == 0:
        (run / "step-1").mkdir(parents=True)
        (run / "step-1" / "mine").write_text("mine")
    text = error_of_all(lambda: begin(Contents(step=1, state_dict={"a": torch.ones(3)})))
    assert "rank 0: TargetExistsError: " in text
    assert "step-1: exists already and was left as it is" in text
    assert (run / "step-1" / "mine").read_text() == "mine"
    assert [path.name for path in run.iterdir()] == ["step-1"]
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(run)


def check_ranks_may_hold_different_tensors(begin: Callable[[Contents], SaveInProgress], rank: int) -> None:
    mine = {"both": torch.ones(3), f"stage-{rank}": torch.full((2 + rank,), rank)}  # as with pipeline parallelism
    job = begin(Contents(step=1, state_dict=mine))
    job.write()
    assert read_index(job.commit()).tensors.keys() == {"both", "stage-0", "stage-1"}


def filled(value: float) -> nn.Module:
    model = nn.Linear(300, 300)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def value_of(model: nn.Module) -> float:
    (value,) = {value for parameter in model.parameters() for value in parameter.flatten().tolist()}
    return value


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory of one process with steps 1, 2 and 3; the weights are the step."""
    for step in (1, 2, 3):
        save_one(tmp_path / "run", step)
    return tmp_path / "run"


def save_one(directory: Path, step: int, **options: Any) -> None:
    save = ShardedSave(directory, model=filled(step), when=every(1), async_mode="disabled", **options)
    save.save(step)
    save.close()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def replace_by_another_step(path: Path) -> None:
    other = path.parent.with_name("step-1") / path.name
    assert other.stat().st_size == path.stat().st_size
    shutil.copyfile(other, path)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "bit flipped in a shard": ("__0_0.distcp", flip_a_bit),
    "shard truncated": ("__0_0.distcp", lambda path: os.truncate(path, 1000)),
    "shard deleted": ("__0_0.distcp", Path.unlink),
    "shard of another step": ("__0_0.distcp", replace_by_another_step),
    "index empty, as after a power loss": (".metadata", lambda path: os.truncate(path, 0)),
    "index deleted": (".metadata", Path.unlink),
    "metadata.json empty": (METADATA_FILE, lambda path: os.truncate(path, 0)),
    "metadata.json of a later version": (METADATA_FILE, lambda path: path.write_text('{"checkpoint_type": "sharded"}')),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_set_aside_and_its_step_can_be_saved_again(
    run: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, damage = DAMAGE[kind]
    damage(run / "step-3" / name)
    model = filled(0)
    save = ShardedSave(run, model=model, when=every(1), async_mode="disabled")
    assert save.resume() == 2
    assert value_of(model) == 2
    assert f"{run / 'step-3'} is damaged and was set aside as {run / '.step-3.damaged-'}" in caplog.text
    assert name in caplog.text
    save.save(3)
    assert committed_steps(run) == [1, 2, 3]
    assert find_damage(run / "step-3") == []
    assert len([*run.glob(".step-3.damaged-*")]) == 1


def test_several_damaged_checkpoints_are_passed_over(run: Path) -> None:
    for step in (2, 3):
        flip_a_bit(run / f"step-{step}" / "__0_0.distcp")
    model = filled(0)
    assert ShardedSave(run, model=model, when=every(1)).resume() == 1
    assert value_of(model) == 1


def test_if_all_are_damaged_that_is_an_error_and_not_a_fresh_start(run: Path) -> None:
    for step in (1, 2, 3):
        flip_a_bit(run / f"step-{step}" / "__0_0.distcp")
    save = ShardedSave(run, model=filled(0), when=every(1), async_mode="disabled")
    with pytest.raises(IncompleteCheckpointError, match="every checkpoint is damaged") as error:
        save.resume()
    assert "step-1, step-2, step-3" in str(error.value)
    assert "hold what was loaded from step-1, which is damaged" in str(error.value)
    assert error.value.path == run
    for act in (save.on_step_end, save.save):
        with pytest.raises(UsageError, match="loaded from step-1, which is damaged: nothing is saved"):
            act(1)
    assert committed_steps(run) == []
    save_one(run.with_name("other"), 5)
    assert save.resume(directory=run.with_name("other")) == 5
    save.save(6)
    assert committed_steps(run) == [6]


def test_nothing_is_loaded_from_a_checkpoint_whose_damage_can_be_seen_without_reading_shards(run: Path) -> None:
    sound = shutil.copytree(run / "step-2", run.with_name("sound") / "step-2")
    for step in (1, 2, 3):
        os.truncate(run / f"step-{step}" / "__0_0.distcp", 1000)
    model = filled(0)
    save = ShardedSave(run, model=model, when=every(1))
    with pytest.raises(IncompleteCheckpointError, match="step-1, step-2, step-3\n") as error:
        save.resume()
    assert str(error.value).endswith(
        "Nothing was loaded. Put a sound copy of a step there, or use resume(directory=...). "
        "Otherwise a process that is started again begins at step 0."
    )
    assert value_of(model) == 0
    assert ShardedSave(run, model=filled(0), when=every(1)).resume() is None  # as the error says
    assert save.resume(directory=sound.parent) == 2
    shutil.copytree(sound, run / "step-2")
    assert save.resume() == 2
    assert value_of(model) == 2


def test_after_a_damaged_checkpoint_the_one_before_must_hold_all_that_it_held(run: Path) -> None:
    model = filled(0)
    ema = EMA(model)
    with_average = ShardedSave(run, model=model, ema=ema, when=every(1), async_mode="disabled", on_missing="start")
    assert with_average.resume() == 3
    with_average.save(4)
    flip_a_bit(run / "step-4" / "__0_0.distcp")
    with pytest.raises(MismatchError, match="has no ema") as error:
        with_average.resume()
    assert "loaded from step-4, which is damaged" in error.value.__notes__[0]
    with pytest.raises(UsageError, match="loaded from step-4"):
        with_average.save(4)
    again = filled(0)
    assert ShardedSave(run, model=again, ema=EMA(again), when=every(1), on_missing="start").resume() == 3


def test_two_ranks_pass_over_a_damaged_checkpoint_together(tmp_path: Path) -> None:
    run_on_ranks(run_damaged, 2, tmp_path, tmp_path / "run")


def run_damaged(directory: Path) -> None:
    logging.disable()
    model = sharded_model()
    save = ShardedSave(directory, model=model, when=every(1))
    for step in (1, 2):
        with torch.no_grad():
            model.weight.fill_(step)
        save.save(step)
    save.close()
    dist.barrier()
    if dist.get_rank() == 0:
        flip_a_bit(directory / "step-2" / "__1_0.distcp")
    dist.barrier()
    save = ShardedSave(directory, model=model, when=every(1))
    assert save.resume() == 1
    assert model.weight.to_local().eq(1).all()
    save.save(2)
    save.close()
    assert find_damage(directory / "step-2") == []


FOREIGN = ["step-007", "step-1.bak", "old-step-2", "hf-export-step-3", "notes", ".step-1.damaged-0123456789abcdef"]


def test_what_is_not_ours_survives_saving_and_retention(tmp_path: Path) -> None:
    for name in FOREIGN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text(name)
    (tmp_path / "step-0").mkdir()  # a step by its name, but not a checkpoint of ours
    for step in range(1, 5):
        save_one(tmp_path, step, keep=latest(1))
    assert {path.name for path in tmp_path.iterdir()} == {*FOREIGN, "step-0", "step-4", ".retention.json"}
    assert all((tmp_path / name / "mine").read_text() == name for name in FOREIGN)


TARGETS: dict[str, Callable[[Path], object]] = {
    "file": Path.touch,
    "empty directory": Path.mkdir,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "committed step": lambda path: save_one(path.parent, 1),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_an_existing_target_is_refused_and_left_as_it_is_and_the_next_step_is_saved(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "step-1"
    TARGETS[kind](target)
    before = target.lstat()
    save = ShardedSave(tmp_path, model=filled(1), when=every(1))
    with pytest.raises(TargetExistsError, match="step-1: exists already and was left as it is"):
        save.save(1)
    assert (target.lstat().st_ino, target.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    save.save(2)
    save.close()
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-2"}


def test_an_error_in_the_background_is_raised_by_the_next_moment_or_by_close(tmp_path: Path) -> None:
    for next_moment in ("step", "close"):
        directory = tmp_path / next_moment
        save = ShardedSave(directory, model=nn.Linear(1024, 1024), when=every(2))
        limit_files(LIMIT)
        try:
            save.on_step_end(2)
            with pytest.raises(ShardsmithError, match="File too large"):
                save.save(4) if next_moment == "step" else save.close()
        finally:
            limit_files(resource.RLIM_INFINITY)
        save.close()
        assert [*directory.iterdir()] == []


def test_a_start_sweeps_what_dead_attempts_left(tmp_path: Path) -> None:
    for name in (".step-1.tmp-0123456789abcdef", ".step-2.trash-0123456789abcdef"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"torn")
    save_one(tmp_path, 1)
    assert not any(is_leftover(path.name) for path in tmp_path.iterdir())
    assert read_metadata(tmp_path / "step-1").step == 1
