"""What is recorded of a trainer's folder, and what is refused of such a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardsmith.errors import CheckpointNotFoundError, CorruptCheckpointError
from shardsmith.formats.folder import LiveModel, record_folder
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.companion import (
    FolderRecord,
    companion_of,
    find_folder_damage,
    is_complete,
    is_deserted,
    read_folder_record,
)
from shardsmith.manifest.metadata import TensorRecord
from shardsmith.manifest.seal import SEAL
from shardsmith.manifest.trainer_folders import last_checkpoint

TENSORS = {"w": TensorRecord(shape=(2, 3), dtype="float32", digest="0" * 32)}


def make_folder(folder: Path, step: int = 7) -> Path:
    """As a trainer leaves it, with our record; the mark is a file here."""
    for name in ("model.safetensors", "optimizer.pt", "runs/events"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of step {step}")
    (folder / ".shardsmith.tmp-0123456789abcdef").mkdir()
    record = record_folder(Ranks(), folder, step, LiveModel(TENSORS, {}))
    companion_of(folder).mkdir()
    (companion_of(folder) / "folder.json").write_bytes(record.to_json())
    (companion_of(folder) / "metadata.json").write_text("{}")
    return folder


def damage(folder: Path, **options: Any) -> list[str]:
    """Without that of our own directory, whose metadata.json is none."""
    return [line for line in find_folder_damage(folder, **options) if "metadata.json" not in line]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "checkpoint-7")
    found = read_folder_record(folder)
    assert (found.step, found.tensors) == (7, TENSORS)
    assert {name: file.size for name, file in found.files.items()} == {
        "model.safetensors": 27,
        "optimizer.pt": 22,
        "runs/events": 21,
    }
    assert is_complete(folder)
    assert damage(folder) == []


def test_what_changed_or_went_is_found_by_name_and_the_optimizer_may_go(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "checkpoint-7")
    (folder / "optimizer.pt").unlink()
    assert damage(folder) == ["optimizer.pt: cannot be read: No such file or directory"]
    assert damage(folder, weights_only=True) == []
    (folder / "model.safetensors").write_text("model.safetensors of step 8")
    assert damage(folder, weights_only=True, contents=False) == []
    (line,) = damage(folder, weights_only=True)
    assert line.startswith("model.safetensors: has changed since it was written")


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"step": -1},
        {"files": {"../outside": {"size": 1, "xxh3_128": "0" * 32}}},
        {"files": {"/etc/passwd": {"size": 1, "xxh3_128": "0" * 32}}},
        {"files": {"a": {"size": 1}}},
        {"files": ["a"]},
        {"tensors": {"w": {"shape": [2], "dtype": "no such", "digest": "0" * 32}}},
        {"tensors": None},
    ],
    ids=str,
)
def test_a_record_that_is_none_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = make_folder(tmp_path / "checkpoint-7")
    path = companion_of(folder) / "folder.json"
    content = json.loads(path.read_text())
    del content[SEAL]  # as a record that is older than the seal
    path.write_text(json.dumps(content | change))
    with pytest.raises(CorruptCheckpointError, match=r"folder\.json: is damaged"):
        read_folder_record(folder)
    assert len(find_folder_damage(folder)) == 1
    assert last_checkpoint(tmp_path) is None


def test_a_folder_without_a_record_has_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        read_folder_record(tmp_path)
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_folder_with_nothing_but_ours_in_it_is_deserted(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "checkpoint-7")
    assert not is_deserted(folder)
    for name in read_folder_record(folder).files:
        (folder / name).unlink()
    (folder / "runs").rmdir()
    assert is_deserted(folder)
    assert is_deserted(tmp_path / "checkpoint-8")


def test_an_empty_record_survives(tmp_path: Path) -> None:
    empty = FolderRecord(step=0, files={}, tensors={})
    companion_of(tmp_path).mkdir()
    (companion_of(tmp_path) / "folder.json").write_bytes(empty.to_json())
    assert read_folder_record(tmp_path) == empty


def test_every_bit_of_a_record_counts(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "checkpoint-7")
    path = companion_of(folder) / "folder.json"
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        assert find_folder_damage(folder), f"byte {at}"


def test_a_folder_of_trainer_that_was_copied_to_another_step_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a folder that accelerate has written the number is none of a step."""
    for name, reason in (("trainer_state.json", "is of step 7, not of step 9"), ("other.json", "")):
        parent = tmp_path / name
        folder = make_folder(parent / "checkpoint-7")
        (folder / name).write_text("{}")
        folder.rename(parent / "checkpoint-9")
        assert [line for line in damage(parent / "checkpoint-9") if reason in line or not reason] == (
            ["folder.json is of step 7, not of step 9: it was copied or renamed"] if reason else []
        )
        if reason:
            assert last_checkpoint(parent) is None
            assert "is passed over: folder.json is of step 7" in caplog.text
