"""A checkpoint is the step that it says: in its name, its manifest and its state."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shardsmith.commands.inspect import inspect
from shardsmith.hooks import every
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.manifest.seal import SEAL
from tests.hooks.training import run_training


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that has saved steps 2, 4 and 6. Read only."""
    directory = tmp_path_factory.mktemp("run") / "steps"
    run_training(directory, 6, sharding="single", when=every(2))
    return directory


def say_another_step(checkpoint: Path) -> None:
    path = checkpoint / "metadata.json"
    content = json.loads(path.read_text())
    del content[SEAL]
    path.write_text(json.dumps(content | {"step": 5000}))


def replace_by_copy(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("step-4"), checkpoint)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


WRONG: dict[str, Callable[[Path], object]] = {
    "a copy of another step": replace_by_copy,
    "renamed": lambda path: path.rename(path.with_name("step-900")),
    "manifest of another step": say_another_step,
    "half deleted": lambda path: (path / "metadata.json").unlink(),
    "a folder for a manifest": lambda path: replace_by_folder(path / "metadata.json"),
    "a folder for the index": lambda path: replace_by_folder(path / ".metadata"),
    "a folder for a file": lambda path: replace_by_folder(path / "__0_0.distcp"),
    "without its index": lambda path: (path / ".metadata").unlink(),
    "cut off": lambda path: (path / "__0_0.distcp").write_bytes(b""),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_resume_takes_the_step_before_says_why_and_saves_the_step_anew(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    directory = tmp_path / "steps"
    shutil.copytree(run, directory)
    WRONG[wrong](directory / "step-6")
    with caplog.at_level(logging.INFO):
        assert run_training(directory, 6, sharding="single", when=every(2)) == 6
    said = [record for record in caplog.records if "set aside" in record.getMessage()]
    assert len(said) == 1
    assert f"resumed from {directory / 'step-4'}" in caplog.text
    assert find_damage(directory / "step-6") == []
    assert not (directory / "step-900").exists()


def test_what_is_half_deleted_in_a_folder_without_steps_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-7").mkdir(parents=True)
    (tmp_path / "step-7" / "__0_0.distcp").write_bytes(b"somebody else's")
    run_training(tmp_path, 2, sharding="single", when=every(2))
    assert (tmp_path / "step-7").is_dir()


def test_inspect_names_a_copied_step_and_a_foreign_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "step-4", tmp_path / "step-6")
    assert inspect(tmp_path / "step-6") == 1
    assert "of step 4, not of step 6" in capsys.readouterr().out
    shutil.copytree(run / "step-4", tmp_path / "final")
    assert inspect(tmp_path / "final", verify=True) == 0
    (tmp_path / "final" / "notes\x1b[31m").touch()
    capsys.readouterr()
    assert inspect(tmp_path / "final") == 1
    assert "notes\\x1b[31m" in capsys.readouterr().out
