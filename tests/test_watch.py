from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Barrier, Timer

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn

from shardsmith import cli
from shardsmith.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ProtectedPathError,
    TargetExistsError,
    UsageError,
    WriteError,
)
from shardsmith.ground.commit import remove
from shardsmith.hooks import EMA, Hooks, ShardedSave, every, latest
from shardsmith.watch import Stop, Watcher, WatchOptions, pending_steps, stopped_by_signals
from tests.dcp_directories import save
from tests.export.test_to_hf_refusals import files_no_larger_than, signal_at, without_times
from tests.forked import run_forked, server

COMMAND = [sys.executable, "-m", "shardsmith.cli", "watch"]


@dataclass(frozen=True, slots=True)
class Place:
    """A run's checkpoints, a base, and where the exports should go."""

    checkpoints: Path
    base: Path
    output: Path

    def arguments(self, *options: str) -> list[str]:
        return [str(self.checkpoints), "--output_dir", str(self.output), "--base_model_path", str(self.base), *options]

    def run(self, *options: str) -> int:
        """One pass of the command."""
        return cli.main(["watch", *self.arguments("--once", *options)])

    def watcher(self, **options: object) -> Watcher:
        return Watcher(self.checkpoints, self.output, self.base, WatchOptions(**options))  # type: ignore[arg-type]

    def exports(self) -> list[str]:
        return sorted(os.listdir(self.output))


def train(directory: Path, steps: int, **options: object) -> None:
    """Save each step; each weight of main is the number of the step then, and each of the average a half less."""
    model = nn.Linear(5, 3)
    ema = EMA(model, decay=0.5)
    save = ShardedSave(directory, model=model, ema=ema, when=every(1), **options)  # type: ignore[arg-type]
    with Hooks(ema, save) as hooks:
        for step in range(1, steps + 1):
            for parameter in model.parameters():
                nn.init.constant_(parameter, step)
            hooks.step(step)


def assert_of_one_step(export: Path) -> None:
    """That everything in an export is of the step that it is named after."""
    step = int(export.name.removeprefix("step-"))
    assert json.loads((export / "shardsmith.json").read_text())["step"] == step
    for tensor in load_file(export / "model.safetensors").values():
        assert torch.equal(tensor, torch.full_like(tensor, step))
    average = [tensor.unique().tolist() for tensor in load_file(export / "ema.safetensors").values()]
    assert len(average) == 2
    assert sorted(os.listdir(export)) == [
        "README.md",
        "config.json",
        "ema.safetensors",
        "model.safetensors",
        "shardsmith.json",
    ]


@pytest.fixture(scope="module")
def run_of_3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    train(directory, 3)
    return directory


@pytest.fixture
def empty(tmp_path: Path) -> Place:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "odd"}')
    return Place(tmp_path / "checkpoints", tmp_path / "base", tmp_path / "hf")


@pytest.fixture
def place(empty: Place, run_of_3: Path) -> Place:
    shutil.copytree(run_of_3, empty.checkpoints)
    return empty


PENDING: dict[str, tuple[dict[str, object], list[int]]] = {
    "oldest first": ({"committed": [30, 10, 20]}, [10, 20, 30]),
    "never twice": ({"committed": [10, 20, 30], "exported": [10, 30, 40]}, [20]),
    "not what failed": ({"committed": [10, 20, 30], "failed": [10]}, [20, 30]),
    "multiples": ({"committed": [5, 10, 15, 20], "every": 10}, [10, 20]),
    "only what would be kept": ({"committed": [10, 20, 30], "keep_latest": 2}, [20, 30]),
    "not what was removed": ({"committed": [10, 20, 30], "exported": [20, 30], "keep_latest": 2}, []),
    "newer than what is kept": ({"committed": [10, 20, 30], "exported": [10, 20], "keep_latest": 2}, [30]),
    "the newest failed": ({"committed": [10, 20, 30], "failed": [30], "keep_latest": 2}, [10, 20]),
    "kept among multiples": ({"committed": [10, 15, 20, 25], "every": 10, "keep_latest": 1}, [20]),
    "nothing": ({"committed": []}, []),
}


@pytest.mark.parametrize(("given", "expected"), PENDING.values(), ids=PENDING)
def test_what_is_pending(given: dict[str, list[int]], expected: list[int]) -> None:
    exported = given.pop("exported", [])
    assert pending_steps(given.pop("committed"), exported, **given) == expected  # type: ignore[arg-type]


def test_every_step_is_exported_once_oldest_first(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(nn.Linear(5, 3).state_dict(), place.base / "of_before.safetensors")
    assert place.run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "of_before.safetensors" in line]) == 1  # said of the first step alone
    wrote = [line.split(",")[0] for line in lines if line.startswith("wrote")]
    assert wrote == [f"wrote {place.output}/step-{step}" for step in (1, 2, 3)]
    for step in (1, 2, 3):
        assert_of_one_step(place.output / f"step-{step}")
    before = {path: path.stat().st_ino for path in place.output.rglob("*")}
    assert place.run() == 0
    assert capsys.readouterr() == ("", "")
    assert {path: path.stat().st_ino for path in place.output.rglob("*")} == before


def test_an_export_is_what_to_hf_makes(place: Place, tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--models", "main", "--max_shard_size", "30B", "--quiet"]
    assert place.run(*options) == 0
    where = [f"--checkpoint_dir={place.checkpoints / 'step-2'}", f"--base_model_path={place.base}"]
    assert cli.main(["to-hf", *where, f"--output_dir={tmp_path / 'one'}", *options]) == 0
    assert without_times(place.output / "step-2") == without_times(tmp_path / "one")


def test_only_committed_checkpoints_of_ours_count(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    (place.checkpoints / "step-1").rename(place.checkpoints / f".step-1.tmp-{'0' * 16}")
    (place.checkpoints / "step-2" / "metadata.json").unlink()
    shutil.copytree(place.checkpoints / "step-3", place.checkpoints / "old-step-4")
    watcher = place.watcher()
    assert [outcome.step for outcome in watcher.catch_up(Stop())] == [3]
    assert place.exports() == ["step-3"]
    assert "no save of Shardsmith has completed step-2 (dcp)" in caplog.text
    assert "step-1" not in caplog.text
    assert "step-4" not in caplog.text
    caplog.clear()
    assert [*watcher.catch_up(Stop())] == []
    assert caplog.text == ""  # once is enough


def test_steps_of_others_alone_are_refused_with_what_exports_them(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    state = nn.Linear(5, 3).state_dict()
    plain = replace(place, checkpoints=tmp_path / "plain")
    for step in (10, 20):
        save(dict(state), plain.checkpoints / f"step-{step}")
    assert plain.run() == 2
    said = capsys.readouterr().err
    assert "no save of Shardsmith has completed step-10 (dcp), step-20 (dcp)" in said
    assert not place.output.exists() or place.exports() == []
    command = said.partition("export it: shardsmith ")[2].split()
    assert cli.main(command) == 0
    exported = load_file(place.output / "step-20" / "model.safetensors")
    assert all(torch.equal(value.float(), state[name].bfloat16().float()) for name, value in exported.items())
    assert exported.keys() == state.keys()


@pytest.mark.parametrize("name", ["checkpoint-500", "global_step_10", "epoch_3", "step_7"])
def test_folders_of_other_trainers_are_named(name: str, empty: Place, capsys: pytest.CaptureFixture[str]) -> None:
    save(dict(nn.Linear(5, 3).state_dict()), empty.checkpoints / name)
    assert empty.run() == 2
    assert f"has completed {name} (dcp)" in capsys.readouterr().err


def test_of_a_folder_above_the_steps_the_one_to_give_is_named(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.move(place.checkpoints, run / "checkpoints")
    above = replace(place, checkpoints=run)
    assert above.run() == 2
    folder = capsys.readouterr().err.partition("in a folder below; give ")[2].strip()
    assert replace(place, checkpoints=Path(folder)).run() == 0
    assert place.exports() == ["step-1", "step-2", "step-3"]


def test_a_run_without_a_step_is_said_to_have_none(empty: Place, capsys: pytest.CaptureFixture[str]) -> None:
    empty.checkpoints.mkdir()
    assert empty.run() == 0
    assert capsys.readouterr().out == f"{empty.checkpoints} has no step yet: nothing was exported\n"
    assert empty.run("--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_only_multiples_and_the_latest_are_kept(place: Place) -> None:
    assert place.run("--every", "2") == 0
    assert place.exports() == ["step-2"]
    assert place.run("--keep_latest", "1", "--ema_as", "directory") == 0
    assert place.exports() == ["step-3", "step-3-ema"]
    train(place.checkpoints.with_name("longer"), 4)
    (place.checkpoints.with_name("longer") / "step-4").rename(place.checkpoints / "step-4")
    (place.output / "step-1").mkdir()  # is none of ours
    assert place.run("--keep_latest", "1", "--ema_as", "directory") == 0
    assert place.exports() == ["step-1", "step-4", "step-4-ema"]


def flip_a_bit(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    data[-1] ^= 1
    (checkpoint / "__0_0.distcp").write_bytes(data)


def test_a_damaged_step_is_reported_once_and_does_not_stop_the_others(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_a_bit(place.checkpoints / "step-2")
    assert place.run("--quiet") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("step-2 was not exported: CorruptCheckpointError\n")
    assert "__0_0.distcp: has changed" in printed.err
    assert place.exports() == ["step-1", "step-3"]


def test_a_damaged_step_is_left_out_until_it_is_saved_anew(place: Place, run_of_3: Path) -> None:
    flip_a_bit(place.checkpoints / "step-2")
    watcher = place.watcher()
    assert [outcome.status for outcome in watcher.catch_up(Stop())] == ["exported", "failed", "exported"]
    assert isinstance(watcher.failed[2], CorruptCheckpointError)
    assert list(watcher.catch_up(Stop())) == []
    shutil.rmtree(place.checkpoints / "step-2")
    assert list(watcher.catch_up(Stop())) == []
    shutil.copytree(run_of_3 / "step-2", place.checkpoints / "step-2")
    assert [(outcome.step, outcome.status) for outcome in watcher.catch_up(Stop())] == [(2, "exported")]
    assert watcher.failed == {}


def test_a_full_disk_is_reported_once_and_tried_again(place: Place) -> None:
    watcher = place.watcher()
    with files_no_larger_than(50):
        assert [type(outcome.error) for outcome in watcher.catch_up(Stop())] == [WriteError] * 3
        assert list(watcher.catch_up(Stop())) == []
    assert place.exports() == []
    assert [outcome.status for outcome in watcher.catch_up(Stop())] == ["exported"] * 3
    assert watcher.failed == {}


def test_what_is_no_export_of_ours_is_left_as_it_is(place: Place) -> None:
    (place.output / "step-2").mkdir(parents=True)
    watcher = place.watcher()
    assert [outcome.status for outcome in watcher.catch_up(Stop())] == ["exported", "failed", "exported"]
    assert isinstance(watcher.failed[2], TargetExistsError)
    assert os.listdir(place.output / "step-2") == []


def test_a_step_with_one_of_its_directories_gets_the_other(place: Place) -> None:
    assert place.run("--ema_as", "directory") == 0
    before = (place.output / "step-2-ema").stat().st_ino
    shutil.rmtree(place.output / "step-2")
    assert place.run("--ema_as", "directory") == 0
    assert (place.output / "step-2" / "model.safetensors").is_file()
    assert (place.output / "step-2-ema").stat().st_ino == before


ACCIDENTS = {  # what the watcher is about to do -> what happens to the checkpoint then, and the outcome
    "removed before it is held": ("open", "checkpoints/step-2/metadata.json", shutil.rmtree, "gone"),
    "retention while it is read": ("os.mkdir", "hf/.step-2.", remove, "exported"),
    "removed by force while it is read": ("os.mkdir", "hf/.step-2.", shutil.rmtree, "failed"),
}


def run_with_accident(_: int, place: Place, event: str, path: str, happens: Callable[[Path], object]) -> None:
    """A pass during which something happens to step 2, once; the outcomes go to a file."""
    left = [happens]

    def audit(found: str, args: tuple[object, ...]) -> None:
        if left and found == event and f"{place.output.parent}/{path}" in os.fsdecode(str(args[0])):
            left.pop()(place.checkpoints / "step-2")

    watcher = place.watcher()
    sys.addaudithook(audit)
    outcomes = {outcome.step: outcome.status for outcome in watcher.catch_up(Stop())}
    assert not left
    (place.output / "outcomes.json").write_text(json.dumps(outcomes))


@pytest.mark.parametrize(("event", "path", "happens", "expected"), ACCIDENTS.values(), ids=ACCIDENTS)
def test_a_step_that_goes_is_a_failure_only_if_it_was_held(
    event: str, path: str, happens: Callable[[Path], object], expected: str, place: Place
) -> None:
    run_forked(run_with_accident, 1, place, event, path, happens)
    outcomes = json.loads((place.output / "outcomes.json").read_text())
    assert outcomes == {"1": "exported", "2": expected, "3": "exported"}
    assert (place.checkpoints / "step-2").exists() == (happens is remove)
    if expected == "exported":
        assert_of_one_step(place.output / "step-2")


REFUSED: dict[str, tuple[list[str], type[Exception]]] = {
    "no steps": (["--every", "0"], UsageError),
    "keep none": (["--keep_latest", "0"], UsageError),
    "no size": (["--max_shard_size", "5 bananas"], UsageError),
}


@pytest.mark.parametrize(("options", "error"), REFUSED.values(), ids=REFUSED)
def test_options_that_make_no_sense_are_refused(
    options: list[str], error: type[Exception], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run(*options) == 2
    assert error.__name__ in capsys.readouterr().err
    assert not place.output.exists()


def test_places_that_make_no_sense_are_refused(place: Place) -> None:
    inside = Place(place.checkpoints, place.base, place.checkpoints / "hf")
    one = Place(place.checkpoints / "step-2", place.base, place.output)
    no_base = Place(place.checkpoints, place.base / "x", place.output)
    for wrong, error in ((inside, ProtectedPathError), (one, UsageError), (no_base, CheckpointNotFoundError)):
        with pytest.raises(error):
            wrong.watcher()
    assert not place.output.exists()


def test_a_run_folder_that_is_not_there_is_waited_for_but_not_once(empty: Place, run_of_3: Path) -> None:
    assert empty.run() == 2
    stop, watcher = Stop(), empty.watcher()
    Timer(0, lambda: shutil.copytree(run_of_3, empty.checkpoints)).start()
    assert [outcome.step for outcome in itertools.islice(watcher.follow(stop, 0.01), 3)] == [1, 2, 3]


def test_the_first_signal_is_a_wish_and_the_second_an_order() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopped_by_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        stop.wait(3600)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@contextlib.contextmanager
def following(place: Place, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process that goes on until it is stopped, after its first line."""
    with subprocess.Popen(
        [*COMMAND, *place.arguments("--interval_secs", "0.02", *options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("exporting from ")
        yield process
        process.kill()


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_watcher_that_waits(which: signal.Signals, place: Place) -> None:
    with following(place) as process:
        assert process.stdout is not None
        wrote = (line for line in process.stdout if line.startswith("wrote"))
        assert [line.split(",")[0][-6:] for line in itertools.islice(wrote, 3)] == ["step-1", "step-2", "step-3"]
        process.send_signal(which)
        assert process.communicate() == ("", "")
        assert process.returncode == 0
    assert place.exports() == ["step-1", "step-2", "step-3"]


def test_a_run_with_rotation_is_followed_without_a_torn_export(empty: Place) -> None:
    run = mp.get_context("spawn").Process(target=train, args=(empty.checkpoints, 40), kwargs={"keep": latest(1)})
    with following(empty, "--dtype", "original") as watcher:
        assert watcher.stdout is not None
        run.start()
        assert any(f"{empty.output}/step-40," in line for line in watcher.stdout)
        run.join()
        assert run.exitcode == 0
        watcher.send_signal(signal.SIGTERM)
        assert watcher.communicate()[1] == ""
        assert watcher.returncode == 0
    assert len(empty.exports()) > 1
    for name in empty.exports():
        assert_of_one_step(empty.output / name)


def run_two(rank: int, place: Place, rounds: int, barrier: Barrier) -> None:
    """One of several watchers that begin at the same time; what became of the steps goes to a file."""
    for number in range(rounds):
        output = place.output / str(number)
        watcher = Place(place.checkpoints, place.base, output).watcher()
        barrier.wait()
        outcomes = [(outcome.step, outcome.status) for outcome in watcher.catch_up(Stop())]
        barrier.wait()
        (output / f"{rank}.json").write_text(json.dumps(outcomes))


def test_of_two_watchers_one_exports_each_step_and_the_other_goes_on(place: Place) -> None:
    place.output.mkdir()
    run_forked(run_two, 2, place, 10, server().Barrier(2))
    for folder in place.output.iterdir():
        outcomes = [
            tuple(outcome) for rank in range(2) for outcome in json.loads((folder / f"{rank}.json").read_text())
        ]
        assert sorted(step for step, status in outcomes if status == "exported") == [1, 2, 3]
        assert {status for _, status in outcomes} <= {"exported", "elsewhere"}
        assert sorted(os.listdir(folder)) == ["0.json", "1.json", "step-1", "step-2", "step-3"]


def run_with_signals(_: int, place: Place, which: signal.Signals, complete: dict[str, object], report: Path) -> None:
    """Watch in a child that gets the signal at its first step on disk, its second, ...; then again without one."""
    options = ("--quiet", "--ema_as", "directory")
    place.run(*options)  # imports everything, for all the children
    shutil.rmtree(place.output)
    exits = []
    for number in itertools.count(1):
        if (child := os.fork()) == 0:
            signal_at(number, place.output, which)
            os._exit(place.run(*options))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = {path.name: path.stat().st_ino for path in place.output.glob("[!.]*")}
        assert all(without_times(place.output / name) == complete[name] for name in found), f"torn at {number}"
        exits.append({"status": status, "found": sorted(found), "left": len(list(place.output.glob(".*")))})
        if status == 0:
            break
        if (child := os.fork()) == 0:
            os._exit(place.run(*options))
        assert os.waitpid(child, 0)[1] == 0
        after = {path.name: path.stat().st_ino for path in place.output.iterdir()}
        assert after.keys() == complete.keys(), f"not completed after {number}"
        assert after.items() >= found.items(), f"made twice after {number}"
        shutil.rmtree(place.output)
    report.write_text(json.dumps(exits))


@pytest.fixture
def exits(place: Place, request: pytest.FixtureRequest) -> list[dict[str, object]]:
    """What every watcher left that got a signal, the last one being the one that ended before."""
    shutil.rmtree(place.checkpoints / "step-3")
    assert place.run("--ema_as", "directory") == 0
    complete = {name: without_times(place.output / name) for name in place.exports()}
    shutil.rmtree(place.output)
    report = place.base.parent / "report.json"
    run_forked(run_with_signals, 1, place, request.param, complete, report)
    return json.loads(report.read_text())


@pytest.mark.long
@pytest.mark.parametrize("exits", [signal.SIGKILL], indirect=True)
def test_killed_at_any_step_on_disk_it_leaves_whole_exports_and_the_next_run_makes_the_rest(
    exits: list[dict[str, object]],
) -> None:
    *killed, last = exits
    assert len(killed) > 40
    assert {run["status"] for run in killed} == {-signal.SIGKILL}
    assert {len(run["found"]) for run in killed} == {0, 1, 2, 3, 4}
    assert any(run["left"] for run in killed)
    assert last["left"] == 0


@pytest.mark.long
@pytest.mark.parametrize("exits", [signal.SIGTERM], indirect=True)
def test_stopped_at_any_step_on_disk_it_ends_between_exports(exits: list[dict[str, object]]) -> None:
    *stopped, last = exits
    assert len(stopped) > 40
    assert {run["status"] for run in stopped} == {130}
    assert {run["left"] for run in stopped} == {0}
    assert {len(run["found"]) for run in stopped} == {0, 2, 4}
    assert last["left"] == 0
