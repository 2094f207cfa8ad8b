from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import nn

from shardsmith.errors import CheckpointNotFoundError
from shardsmith.ground.commit import Attempt, remove, write_file
from shardsmith.ground.leases import hold, unheld
from shardsmith.hooks import Hooks, ShardedSave, every, latest
from shardsmith.manifest.checkpoints import committed_steps, find_damage

HOLDER = """
import os, sys
from pathlib import Path
from shardsmith.ground.leases import hold

with hold(Path(sys.argv[1])) as held:
    print(held, flush=True)
    sys.stdin.read()
print("let go", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "step-1")


def make_checkpoint(path: Path) -> Path:
    with Attempt(path) as attempt:
        return attempt.commit({"metadata.json": write_file(attempt.directory / "metadata.json", b"{}")})


@contextmanager
def holder(checkpoint: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds it until its input is closed."""
    command = [sys.executable, "-c", HOLDER, str(checkpoint)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_what_is_held_is_not_removed(checkpoint: Path) -> None:
    with hold(checkpoint) as held:
        assert held
        assert not remove(checkpoint)
        assert os.listdir(checkpoint.parent) == ["step-1"]
        assert os.listdir(checkpoint) == ["metadata.json"]
    assert remove(checkpoint)
    assert os.listdir(checkpoint.parent) == []


def test_many_may_hold_and_the_last_one_counts(checkpoint: Path) -> None:
    with hold(checkpoint):
        with hold(checkpoint), hold(checkpoint):
            assert not remove(checkpoint)
        assert not remove(checkpoint)
    assert remove(checkpoint)


def test_another_process_holds_it_until_it_lets_go(checkpoint: Path) -> None:
    with holder(checkpoint) as process:
        assert not remove(checkpoint)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        assert process.stdout.readline() == "let go\n"
        assert remove(checkpoint)


def test_a_killed_holder_holds_nothing_up(checkpoint: Path) -> None:
    with holder(checkpoint) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert remove(checkpoint)


FORK = """
import os, sys
from pathlib import Path
from shardsmith.ground.commit import remove
from shardsmith.ground.leases import hold

reading, writing = os.pipe()
with hold(Path(sys.argv[1])):
    if (child := os.fork()) == 0:
        os.close(writing)
        os.read(reading, 1)  # until the parent closes its end
        os._exit(0)
print(remove(Path(sys.argv[1])))
os.close(writing)
os.waitpid(child, 0)
"""


def test_a_process_that_was_forked_meanwhile_does_not_go_on_holding(checkpoint: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", FORK, str(checkpoint)], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("True\n", "")


def test_an_error_lets_go(checkpoint: Path) -> None:
    with pytest.raises(KeyError), hold(checkpoint):
        raise KeyError
    assert remove(checkpoint)


def test_what_is_not_there_cannot_be_held(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="step-1: there is no such"), hold(tmp_path / "step-1"):
        raise AssertionError


RACE = """
import os, sys
from pathlib import Path
from shardsmith.ground.commit import remove
from shardsmith.errors import CheckpointNotFoundError
from shardsmith.ground.leases import hold

checkpoint, comes_back = Path(sys.argv[1]), sys.argv[2] == "True"
locks = []

def audit(event, args):
    if event == "fcntl.flock":
        locks.append(args)
        if len(locks) == 1:  # whoever wants to hold it has opened it, and is about to lock it
            assert remove(checkpoint)
            if comes_back:
                checkpoint.mkdir()
                (checkpoint / "metadata.json").touch()

sys.addaudithook(audit)
try:
    with hold(checkpoint) as held:
        print(held, remove(checkpoint))
except CheckpointNotFoundError:
    print("gone")
"""


@pytest.mark.parametrize(("comes_back", "found"), [(False, "gone"), (True, "True False")])
def test_a_removal_between_open_and_lock_is_noticed(checkpoint: Path, comes_back: bool, found: str) -> None:
    command = [sys.executable, "-c", RACE, str(checkpoint), str(comes_back)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == (f"{found}\n", "")


def test_a_step_that_is_being_removed_can_be_held_again_if_that_fails(checkpoint: Path) -> None:
    with unheld(checkpoint) as free:
        assert free
    with hold(checkpoint) as held:
        assert held


def test_what_is_not_ours_is_read_without_a_lock(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").touch()
    for path in (tmp_path, tmp_path / "weights.safetensors"):
        with hold(path) as held:
            assert not held


def test_retention_spares_what_is_held_and_a_later_save_removes_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save = ShardedSave(tmp_path, model=nn.Linear(2, 2), when=every(1), keep=latest(1), async_mode="disabled")
    with Hooks(save) as hooks:
        hooks.step(1)
        with hold(tmp_path / "step-1"), caplog.at_level(logging.INFO):
            hooks.step(2)
            hooks.step(3)
            assert committed_steps(tmp_path) == [1, 3]
            assert find_damage(tmp_path / "step-1") == []
        assert caplog.text.count("step-1 is being read; it is removed later") == 2
        hooks.step(4)
    assert sorted(os.listdir(tmp_path)) == [".retention.json", "step-4"]
