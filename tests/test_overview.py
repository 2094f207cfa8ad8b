"""The folder of a run: what ``inspect``, ``clean`` and ``to-hf`` make of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn

from shardsmith import cli
from shardsmith.errors import CheckpointNotFoundError
from shardsmith.ground.commit import Attempt
from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, every
from shardsmith.overview import find_leftovers, inspect_run, newest_step
from shardsmith.tensor_listing import list_tensors
from tests.unreadable import UNREADABLE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # dcp.save of one process

ATTEMPT = "0123456789abcdef"


def train(run: Path, steps: int = 6) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    ema = EMA(model, decay=0.5)
    save = ShardedSave(run / "checkpoints", model=model, ema=ema, when=every(2))
    with Hooks(ema, save, HFExport(run / "hf", model=model, ema=ema, when=every(4), dtype="original")) as hooks:
        for step in range(1, steps + 1):
            nn.init.constant_(model[0].weight, step)
            hooks.step(step)
    return model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(run)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def shardsmith(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_every_step_is_listed_with_its_exports(run: Path) -> None:
    found = inspect_run(run, verify=True)
    assert [(one.step, one.path, one.kind, one.models) for one in found.steps] == [
        (2, "checkpoints/step-2", "checkpoint", ("main", "ema")),
        (4, "checkpoints/step-4", "checkpoint", ("main", "ema")),
        (4, "hf/step-4", "export", ("main", "ema")),
        (6, "checkpoints/step-6", "checkpoint", ("main", "ema")),
    ]
    assert (found.problems, found.leftovers, found.verified) == ([], (), True)
    on_disk = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    assert sum(one.nbytes for one in found.steps) == on_disk
    assert all(one.is_recorded for one in found.steps)


def test_a_step_that_is_a_hugging_face_directory_is_a_checkpoint_of_the_run(run: Path) -> None:
    save = ShardedSave(run / "checkpoints", model=nn.Linear(4, 3), when=every(2), weights="huggingface")
    save.save(8)
    save.close()
    found = [one for one in inspect_run(run).steps if one.step == 8]
    assert [(one.path, one.kind, one.models, one.problems) for one in found] == [
        ("checkpoints/step-8", "checkpoint", ("main",), ())
    ]
    assert newest_step(run) == run / "checkpoints/step-8"


def test_the_folder_of_the_steps_is_a_run_too(run: Path) -> None:
    assert [one.path for one in inspect_run(run / "checkpoints").steps] == ["step-2", "step-4", "step-6"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "a flip in a checkpoint": (lambda run: flip(run / "checkpoints/step-4/__0_0.distcp"), "checkpoints/step-4", True),
    "a flip in an export": (lambda run: flip(run / "hf/step-4/model.safetensors"), "hf/step-4", True),
    "a file that is missing": (
        lambda run: os.remove(run / "checkpoints/step-4/__0_0.distcp"),
        "checkpoints/step-4",
        False,
    ),
    "no manifest": (lambda run: os.remove(run / "checkpoints/step-4/metadata.json"), "checkpoints/step-4", False),
    "a step under another name": (
        lambda run: (run / "checkpoints/step-4").rename(run / "checkpoints/step-5"),
        "checkpoints/step-5",
        False,
    ),
    "an empty folder": (lambda run: (run / "checkpoints/step-9").mkdir(), "checkpoints/step-9", False),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_and_named(what: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harm, where, needs_reading = DAMAGE[what]
    harm(run)
    found = inspect_run(run, verify=needs_reading)
    assert {one.path for one in found.steps if one.problems} == {where}
    assert shardsmith("inspect", run, *["--verify"] * needs_reading) == 1
    assert f"problem {where}: " in capsys.readouterr().out


def test_the_newest_step_that_is_complete_is_taken(run: Path) -> None:
    assert newest_step(run) == run / "checkpoints/step-6"
    assert newest_step(run, 4) == run / "checkpoints/step-4"
    os.truncate(run / "checkpoints/step-6/__0_0.distcp", 10)
    assert newest_step(run) == run / "checkpoints/step-4"
    with pytest.raises(CheckpointNotFoundError, match=r"of a step 6; steps: 2, 4, 6\n.*10 bytes"):
        newest_step(run, 6)
    with pytest.raises(CheckpointNotFoundError, match="a step 7; steps: 2, 4, 6"):
        newest_step(run, 7)
    shutil.rmtree(run / "checkpoints")
    assert newest_step(run) == run / "hf/step-4"


def test_a_run_is_converted_at_its_newest_step_or_at_the_one_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    for options, step in (((), 6), (("--step", 4), 4)):
        output = tmp_path / f"out-{step}"
        options = (*options, "--base-model", tmp_path / "base", "--output-dir", output, "--dtype", "original")
        assert shardsmith("to-hf", "--checkpoint", run, *options) == 0
        assert f"its checkpoint {run}/checkpoints/step-{step} is taken" in capsys.readouterr().err
        assert (load_file(output / "model.safetensors")["0.weight"] == step).all()
    assert shardsmith("to-hf", "--checkpoint", run / "checkpoints/step-4", "--base-model", run, "--step", 4) == 2
    assert "--step needs the folder of a run" in capsys.readouterr().err


FOREIGN = {
    "TorchTitan": "checkpoint/step-30",
    "verl": "global_step_30",
    "BAGEL": "0000030",
    "accelerate": "checkpoint_30",
}


@pytest.mark.parametrize("who", FOREIGN)
def test_runs_of_others_are_listed_and_said_to_record_nothing(
    who: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dcp.save(nn.Linear(2, 2).state_dict(), checkpoint_id=tmp_path / FOREIGN[who])
    (tmp_path / "logs").mkdir()
    (tmp_path / "2024").mkdir()  # a number, and no step
    found = inspect_run(tmp_path)
    assert [(one.step, one.format, one.is_recorded, one.problems) for one in found.steps] == [(30, "dcp", False, ())]
    assert shardsmith("inspect", tmp_path) == 0
    assert "nothing recorded to compare with" in capsys.readouterr().out


def test_what_may_be_deleted_is_shown_and_deleted_when_asked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(run.rglob("*"))
    for name in (f".step-8.tmp-{ATTEMPT}", f".step-2.damaged-{ATTEMPT}", ".step-8.tmp-mine"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "file").write_bytes(b"x" * 1000)
    attempt = Attempt(run / "hf" / "step-9")  # being written by this process
    assert [(one.path, one.kind) for one in find_leftovers(run)] == [
        (f"checkpoints/.step-2.damaged-{ATTEMPT}", "damaged"),
        (f"checkpoints/.step-8.tmp-{ATTEMPT}", "unfinished"),
        (str(attempt.directory.relative_to(run)), "unfinished"),
    ]
    assert shardsmith("clean", run) == 0
    said = capsys.readouterr().out
    assert "2 can be deleted, 1.00 kB; --delete does it" in said
    assert "set aside as damaged or superseded: 1, 1.00 kB; --set-aside includes them" in said
    assert (run / "checkpoints" / f".step-8.tmp-{ATTEMPT}").is_dir()
    assert shardsmith("clean", run, "--delete", "--json") == 0
    printed = json.loads(capsys.readouterr().out)["leftovers"]
    assert [one["deleted"] for one in printed] == [True, False]
    capsys.readouterr()
    assert shardsmith("clean", run, "--delete", "--set-aside") == 0
    assert "set aside" not in capsys.readouterr().out
    attempt.abandon()
    assert shardsmith("clean", run) == 0
    assert capsys.readouterr().out == "0 can be deleted, 0 B\n"
    shutil.rmtree(run / "checkpoints" / ".step-8.tmp-mine")  # no name of ours
    assert set(run.rglob("*")) == before


def test_tensors_are_listed_with_what_torch_says_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    values = {
        "large.mean": torch.randn(1000, dtype=torch.float64) + 1e9,
        "half": torch.randn(7, 9).bfloat16(),
        "float8": torch.randn(40).to(torch.float8_e4m3fn),
        "counts": torch.arange(12).reshape(3, 4),
        "flags": torch.tensor([True, False, True]),
        "complex": torch.randn(5, dtype=torch.complex64),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "broken": torch.tensor([1.0, float("nan"), float("inf"), 3.0]),
    }
    dcp.save(values, checkpoint_id=tmp_path / "dcp")
    found = {one.name: one for one in list_tensors(tmp_path / "dcp", statistics=True)}
    assert {name: (one.shape, one.dtype) for name, one in found.items()} == {
        name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in values.items()
    }
    for name in ("large.mean", "half", "float8", "counts", "flags", "complex", "scalar"):
        value = values[name].abs() if name == "complex" else values[name].double()
        stats = found[name].statistics
        assert stats is not None
        assert (stats.minimum, stats.maximum, stats.not_finite) == (value.min(), value.max(), 0)
        assert stats.zeros == int((value == 0).sum())
        assert stats.mean == pytest.approx(value.double().mean().item(), rel=1e-12)
        assert stats.std == pytest.approx(value.double().std(correction=0).item(), rel=1e-6)
    assert found["empty"].statistics is None
    broken = found["broken"].statistics
    assert broken is not None
    assert (broken.minimum, broken.maximum, broken.mean, broken.std, broken.not_finite) == (1.0, 3.0, 2.0, 1.0, 2)
    assert shardsmith("inspect", tmp_path / "dcp", "--tensors", "c*", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["tensors"]
    assert {one["name"] for one in listed} == {"counts", "complex"}
    assert shardsmith("inspect", tmp_path / "dcp", "--tensors", "nothing*") == 2
    assert "no tensor whose name matches nothing*" in capsys.readouterr().err


def test_a_run_lists_the_tensors_of_its_newest_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shardsmith("inspect", run, "--tensors", "0.*", "--statistics") == 0
    printed = capsys.readouterr().out
    assert f"{run}/checkpoints/step-6" in printed
    assert printed.count("0.weight") == 2  # main and the average


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_step_that_cannot_be_read_is_a_problem_and_the_others_are_listed(
    run: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, reason = UNREADABLE[kind]
    make(run / "checkpoints/step-8")
    for place, shown in (run, "checkpoints/step-8"), (run / "checkpoints", "step-8"):
        found = inspect_run(place)
        assert found.unreadable == {shown: reason}
        assert found.problems == [f"{shown}: {reason}"]
        assert [one.step for one in found.steps if one.kind == "checkpoint"] == [2, 4, 6]
        assert shardsmith("inspect", place) == 1
        assert f"{shown}: {reason}" in capsys.readouterr().out
        assert newest_step(place) == run / "checkpoints/step-6"
        assert shardsmith("clean", place) == 0


@pytest.mark.parametrize("options", [[], ["--step", "4"], ["--tensors"]], ids=["run", "step", "tensors"])
@pytest.mark.parametrize("place", ["checkpoints/step-2/metadata.json", "checkpoints/step-4/page.html", "events.jsonl"])
def test_the_page_of_a_run_overwrites_nothing_of_any_step(
    options: list[str], place: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "events.jsonl").write_text("{}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert shardsmith("inspect", run, *options, "--html", run / place) == 2
    assert "which is only read" in " ".join(capsys.readouterr().err.split())
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert shardsmith("inspect", run, *options, "--html", run / "page.html") == 0
    assert "<html" in (run / "page.html").read_text()


def test_tensors_are_not_listed_as_if_they_were_verified(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shardsmith("inspect", run, "--tensors", "--verify") == 2
    assert "--verify does not go with --tensors" in " ".join(capsys.readouterr().err.split())


def test_statistics_of_what_has_no_finite_element_are_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp.save({"nan": torch.full((3,), torch.nan), "one": torch.ones(2)}, checkpoint_id=tmp_path / "dcp")
    capsys.readouterr()
    assert shardsmith("inspect", tmp_path / "dcp", "--tensors", "--statistics", "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    stats = {one["name"]: one["statistics"] for one in found["tensors"]}
    assert (stats["nan"]["minimum"], stats["nan"]["std"], stats["nan"]["not_finite"]) == (None, None, 3)
    assert (stats["one"]["maximum"], stats["one"]["zeros"]) == (1.0, 0)
