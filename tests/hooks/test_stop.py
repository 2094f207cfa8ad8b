"""A signal ends a run before its time: all ranks after one step, which is saved and resumed from."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from shardsmith.hooks import HFExport, Hooks, last
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from tests.hooks.test_base import Noting
from tests.hooks.test_export import tiny
from tests.hooks.test_save import digests
from tests.hooks.training import run_training
from tests.ranks import run_on_ranks


def test_a_signal_to_one_rank_stops_all_after_one_step_and_the_run_resumes_exactly(tmp_path: Path) -> None:
    run_on_ranks(run_and_stop, 2, tmp_path, tmp_path / "stopped")
    run_on_ranks(run_to_the_end, 2, tmp_path, tmp_path / "stopped")
    run_on_ranks(run_to_the_end, 2, tmp_path, tmp_path / "straight")
    assert digests(tmp_path / "stopped" / "step-12") == digests(tmp_path / "straight" / "step-12")


def run_and_stop(directory: Path) -> None:
    step = run_training(directory, 12, stop_after=6)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, step)
    assert everywhere in ([7, 7], [8, 8])  # 8 if the other rank had finished step 7 before it heard of it
    assert committed_steps(directory) == [5, step]


def run_to_the_end(directory: Path) -> None:
    assert run_training(directory, 12) == 12


def test_torchrun_that_is_told_to_end_leaves_a_checkpoint_of_its_last_step(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "tests.hooks.torchrun_training", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while not (tmp_path / "step-5").is_dir():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[0].splitlines()
    step = committed_steps(tmp_path)[-1]
    assert said == [f"stopped after step {step}"] * 2  # by both ranks
    assert find_damage(tmp_path / f"step-{step}") == []


def work(begun: Any) -> None:
    """In short pieces, between which Python looks for signals."""
    begun.set()
    while True:
        time.sleep(0.01)


def test_a_forked_process_can_be_terminated_and_that_is_no_signal_to_the_run() -> None:
    forked = multiprocessing.get_context("fork")
    with Hooks(stop_on=signal.SIGTERM) as hooks:
        begun = forked.Event()
        child = forked.Process(target=work, args=[begun], daemon=True)
        child.start()
        assert begun.wait(timeout=60)  # Python forgets in the child what came while it was being forked
        child.terminate()
        child.join(timeout=60)
        assert child.exitcode == -signal.SIGTERM
        hooks.step(1)
        assert not hooks.should_stop


def test_a_stop_is_no_end_of_the_training_and_the_handler_is_put_back(tmp_path: Path) -> None:
    notes: list[str] = []
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    theirs = signal.getsignal(signal.SIGTERM)
    export = HFExport(tmp_path, model=tiny(), when=last())
    try:
        with Hooks(Noting("one", notes), export, stop_on=signal.SIGTERM) as hooks:
            hooks.step(1)
            assert not hooks.should_stop
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # the launcher may pass on what the worker has had already
            hooks.step(2)
            assert hooks.should_stop
        assert signal.getsignal(signal.SIGTERM) == theirs
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] * 2
    assert notes == ["one optimizer 1", "one optimizer 2", "one stop 2", "one close"]
    assert [*tmp_path.iterdir()] == []  # what was due at the last step is not


def test_a_second_interrupt_interrupts() -> None:
    hooks = Hooks(stop_on=[signal.SIGINT])
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    hooks.step(1)
    assert hooks.should_stop
    hooks.close()


def test_any_rank_may_ask_for_the_end_without_a_signal() -> None:
    hooks = Hooks()
    hooks.request_stop()
    hooks.step(1)
    assert hooks.should_stop
    hooks.close()
