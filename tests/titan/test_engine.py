"""TorchTitan's steps as ShardedSave's writer makes them: what its own has, and what it resumes from by itself."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from shardsmith.formats.adopt import adopt
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.hooks.in_flight import InFlight
from shardsmith.integrations.torchtitan.manager import HookedManager
from shardsmith.manifest.checkpoints import committed_steps
from shardsmith.manifest.metadata import read_metadata
from shardsmith.sharding.step_copies import Borrowed, StepCopies
from tests.titan.checkpoints import digests_of, steps_in
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs

EMA = {"ema_decay": 0.75}
ENGINE = {**EMA, "engine": True}
EXPORTS = {"export_interval": 2, "export_dtype": "float32"}
MODES = ("disabled", "async", "async_with_pinned_mem")
SCHEDULE = "--lr_scheduler.total_steps=6"


@contextlib.contextmanager
def noting_memory(run: Path) -> Iterator[None]:
    """Write down, for each step and rank, where the memory of the copies is then, and its size in bytes."""
    original = HookedManager.save
    found: list[list[int]] = []

    def save(manager: Any, curr_step: int, last_step: bool = False) -> Any:
        result = original(manager, curr_step, last_step)
        memory = manager._attached.engine._buffer._memory
        found.append([memory.data_ptr(), len(memory)])
        return result

    HookedManager.save = save  # type: ignore[method-assign]
    try:
        yield
    finally:
        HookedManager.save = original  # type: ignore[method-assign]
        (run / f"memory-{dist.get_rank()}.json").write_text(json.dumps(found))


@contextlib.contextmanager
def noting_exports(run: Path) -> Iterator[None]:
    """Write down, for each rank, how much memory the copies for exports have at most, in bytes."""
    original, found = InFlight.close, list[int]()

    def close(in_flight: InFlight) -> None:
        in_flight.background.close()
        in_flight.take_back(in_flight.started)
        found.append(sum(len(one._memory) + len(one.beside._memory) for slot in in_flight._free for one in slot))
        original(in_flight)

    InFlight.close = close  # type: ignore[method-assign]
    try:
        with noting_memory(run):
            yield
    finally:
        InFlight.close = original  # type: ignore[method-assign]
        (run / f"exports-{dist.get_rank()}.json").write_text(json.dumps(found))


@contextlib.contextmanager
def noting_shared(run: Path) -> Iterator[None]:
    """Write down, for each export and rank, of how many tensors the copy of a save is read, and how many there are."""
    original, found = StepCopies.borrow, list[list[int]]()

    def borrow(copies: StepCopies, wanted: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Borrowed:
        borrowed = original(copies, wanted, dtypes)
        found.append([sum(copy is not None for copy in borrowed.copies), len(wanted)])
        return borrowed

    StepCopies.borrow = borrow  # type: ignore[method-assign]
    try:
        with noting_memory(run):
            yield
    finally:
        StepCopies.borrow = original  # type: ignore[method-assign]
        (run / f"shared-{dist.get_rank()}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def runs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs of two ranks, done one after the other. Read only."""
    root = tmp_path_factory.mktemp("engine")
    jobs = {
        mode: Job(
            run=root / mode,
            hooks={**ENGINE, **(EXPORTS if mode == "async" else {}), "prewarm": mode != "disabled"},
            within=partial(noting_shared if mode == "async" else noting_memory, root / mode),
            options=[f"--checkpoint.async_mode={mode}", "--checkpoint.keep_latest_k=2", SCHEDULE, "--training.steps=6"],
        )
        for mode in MODES
    }
    jobs["windows"] = Job(
        run=root / "windows",
        hooks={**ENGINE, **EXPORTS, "prewarm": True, "max_host_memory": "8MB"},
        within=partial(noting_exports, root / "windows"),
        options=["--checkpoint.async_mode=async", "--checkpoint.keep_latest_k=2", SCHEDULE, "--training.steps=6"],
    )
    jobs["torch's"] = Job(run=root / "torch", hooks={**EMA, **EXPORTS}, options=["--training.steps=6", SCHEDULE])
    jobs["alone"] = Job(run=root / "alone", hooks={"engine": True}, options=["--checkpoint.last-save-model-only"])
    run_jobs(assets, 2, root, *jobs.values())
    assert {name: error_of(job) for name, job in jobs.items()} == dict.fromkeys(jobs, "")
    return jobs


@pytest.mark.parametrize("mode", [*MODES, "windows"])
def test_a_step_holds_what_torchs_writer_saves(runs: dict[str, Job], mode: str) -> None:
    ours, theirs = (runs[name].run / "checkpoint" for name in (mode, "torch's"))
    assert steps_in(ours) == ["step-4", "step-6"]
    assert committed_steps(ours) == [4, 6]
    for step in steps_in(ours):
        assert steps_in(ours / step) == [".boxes", *steps_in(theirs / step)]
        assert digests_of(ours / step) == digests_of(theirs / step)
        assert read_metadata(ours / step).ema == read_metadata(theirs / step).ema
        one, other = DcpSource(ours / step), DcpSource(theirs / step)
        assert one.index.objects.keys() == other.index.objects.keys()
        assert {key: one.read_object(key) for key in one.index.objects} == {
            key: other.read_object(key) for key in other.index.objects
        }
        one.close()
        other.close()


@pytest.mark.parametrize("mode", MODES[1:])
def test_prewarm_makes_the_memory_of_the_copies_at_the_first_step(runs: dict[str, Job], mode: str) -> None:
    for rank in range(2):
        found = json.loads((runs[mode].run / f"memory-{rank}.json").read_text())
        assert len(found) == 6
        assert found == [found[0]] * 6
        assert found[0][1] > 1 << 16
        without = json.loads((runs["disabled"].run / f"memory-{rank}.json").read_text())
        assert {size for _, size in without} == {0}


def test_copies_take_no_more_than_the_bound_that_is_set(runs: dict[str, Job]) -> None:
    for rank in range(2):
        found = json.loads((runs["windows"].run / f"memory-{rank}.json").read_text())
        assert {0 < size <= 4_000_000 for _, size in found} == {True}  # there are two windows, and 22 MB of state


def test_copies_for_exports_take_no_more_than_the_bound_either(runs: dict[str, Job]) -> None:
    for rank in range(2):
        (nbytes,) = json.loads((runs["windows"].run / f"exports-{rank}.json").read_text())
        assert 2_000_000 < nbytes <= 8_000_000 + 4096


def test_exports_read_what_a_save_of_the_same_step_has_copied(runs: dict[str, Job]) -> None:
    for rank in range(2):
        found = json.loads((runs["async"].run / f"shared-{rank}.json").read_text())
        # Weights and average of the steps 2, 4 and 6, of which TorchTitan saves the last one without a copy.
        assert len(found) == 6
        assert {shared for shared, _ in found[4:]} == {0}
        # Queries and keys are rearranged for the files, and copied for that.
        assert {shared >= total * 3 // 4 for shared, total in found[:4]} == {True}


@pytest.mark.parametrize("name", ["windows", "async"])
def test_exports_beside_it_hold_the_same(runs: dict[str, Job], name: str) -> None:
    ours, theirs = (runs[one].run / "hf" for one in (name, "torch's"))
    files = [path.relative_to(theirs) for path in sorted(theirs.glob("step-*/*.safetensors"))]
    assert {path.parts[0] for path in files} == {f"step-{n}{suffix}" for n in (2, 4, 6) for suffix in ("", "-ema")}
    for name in files:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_prewarm_without_copies_is_refused(assets: Assets, tmp_path: Path) -> None:
    job = Job(run=tmp_path / "run", hooks={"engine": True, "prewarm": True}, options=["--training.steps=1"])
    run_jobs(assets, 1, tmp_path, job)
    assert 'checkpoint_hooks: prewarm=True makes memory for copies, which async_mode="disabled"' in error_of(job)


def test_a_last_step_of_weights_alone_is_written_in_its_dtype(runs: dict[str, Job]) -> None:
    metadata = read_metadata(runs["alone"].run / "checkpoint" / "step-4")
    assert not any(key.startswith("optimizer.") for key in metadata.tensors)
    assert metadata.tensors["norm.weight"].dtype == "float32"


def linked(runs: dict[str, Job], run: Path, step: str) -> Path:
    """A run that has one step of another, which it can go on from."""
    (run / "checkpoint").mkdir(parents=True)
    (run / "checkpoint" / step).symlink_to(runs["async"].run / "checkpoint" / step)
    return run


def test_a_run_goes_on_from_it_without_the_hooks_as_if_nothing_had_been(
    assets: Assets, runs: dict[str, Job], tmp_path: Path
) -> None:
    plain = Job(run=linked(runs, tmp_path / "plain", "step-4"), options=["--training.steps=6", SCHEDULE])
    hooked = Job(run=linked(runs, tmp_path / "hooked", "step-4"), options=plain.options, hooks=ENGINE)
    run_jobs(assets, 2, tmp_path, plain, hooked)
    assert (error_of(plain), error_of(hooked)) == ("", "")
    assert "Training starts at step 5" in log_of(plain)
    straight = digests_of(runs["torch's"].run / "checkpoint" / "step-6")
    adopt(plain.run / "checkpoint" / "step-6", step=6)
    assert digests_of(plain.run / "checkpoint" / "step-6") == {
        key: digest for key, digest in straight.items() if not key.startswith("ema_")
    }
    assert digests_of(hooked.run / "checkpoint" / "step-6") == straight


def save_what_was_loaded(trainer: Any, run: Path) -> None:
    states = trainer.checkpointer.states
    dcp.save({**states["model"].state_dict(), "optimizer": states["optimizer"]}, checkpoint_id=run / "loaded")
    (run / "step.json").write_text(json.dumps(trainer.step))


def test_it_is_loaded_by_another_number_of_ranks_without_the_hooks(
    assets: Assets, runs: dict[str, Job], tmp_path: Path
) -> None:
    resumed = Job(
        run=linked(runs, tmp_path / "run", "step-4"),
        options=["--checkpoint.exclude_from_loading=dataloader"],  # TorchTitan does not divide it anew
        observe=save_what_was_loaded,
    )
    run_jobs(assets, 1, tmp_path, resumed)
    assert error_of(resumed) == ""
    assert json.loads((resumed.run / "step.json").read_text()) == 4
    adopt(resumed.run / "loaded", step=4)
    loaded, saved = digests_of(resumed.run / "loaded"), digests_of(runs["async"].run / "checkpoint" / "step-4")
    assert loaded == {key: saved[key] for key in loaded}
    assert {"tok_embeddings.weight", "optimizer.state.norm.weight.exp_avg"} <= loaded.keys()


def test_a_step_that_is_saved_once_more_is_replaced(assets: Assets, runs: dict[str, Job], tmp_path: Path) -> None:
    run = linked(runs, tmp_path / "run", "step-4")
    torn = run / "checkpoint" / "step-5"
    torn.mkdir()
    torch.save(1, torn / "__0_0.distcp")
    job = Job(run=run, hooks=ENGINE, options=["--training.steps=5", SCHEDULE])
    run_jobs(assets, 2, tmp_path, job)
    assert error_of(job) == ""
    assert committed_steps(run / "checkpoint") == [4, 5]
    assert digests_of(torn)
